"""What a run waits for: another run, by its folder and, while that is under way, by its Slurm job."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from launcher.judgement import judge
from launcher.run_folder import RunFolder, RunFolderError


@dataclass(frozen=True)
class Upstream:
    """The run before this one."""

    run_dir: str
    job_id: str | None
    """Its Slurm job, None if it was finished already."""

    @property
    def dependency(self) -> str | None:
        """What to wait for in sbatch's notation: the end of the job with exit code 0, however often it is requeued."""
        return None if self.job_id is None else f"afterok:{self.job_id}"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, events: Sequence[dict[str, Any]]) -> Self | None:
        """Return what a run was last submitted to wait for, by its ledger; None if for nothing."""
        after = next((event["after"] for event in reversed(events) if event.get("after")), None)
        return None if after is None else cls(after["run_dir"], after["job_id"])


def wait_for(run_dir: str | Path, executor: str) -> Upstream:
    """Return the run to wait for, as it is now, for a run of `executor`.

    Raises RunFolderError with the way out when that run has ended without being finished, or when a job cannot wait
    for it: only Slurm lets one job wait for another.
    """
    run = RunFolder(Path(run_dir).absolute())
    run.identity()  # says so if this is no run
    now = judge(run)
    if now.state == "finished":
        return Upstream(str(run.path), None)
    if now.at_rest:
        raise RunFolderError(
            f"{run.path} has to be finished first, but it is {now.state}"
            + (f" ({now.detail})" if now.detail else "")
            + f". Continue it: mvit resume {run.path}, and submit what comes after it then."
        )
    if now.executor != "slurm" or executor != "slurm":
        raise RunFolderError(
            f"{run.path} is {now.state} ({now.executor} job {now.job_id}), and only Slurm lets one job wait for "
            f"another. Stay until it is finished with `mvit status {run.path} --follow`, then submit."
        )
    return Upstream(str(run.path), now.job_id)
