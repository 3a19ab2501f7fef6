"""What became of a run: its state, how far it is, and which rank failed first and why."""

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.failure import first_failure
from launcher.lives import is_alive_record
from launcher.processes import identity_from, is_alive, is_local
from launcher.run_folder import RunFolder, read_json_lines

State = Literal["pending", "running", "stopped", "failed", "finished"]
_NOT_SHOWN = ("kind", "time", "total_steps")
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING", "SUSPENDED")


@dataclass(frozen=True)
class RunState:
    """One run at one moment."""

    run_dir: str
    name: str
    state: State
    detail: str  # why, in one line; empty when the state says it all
    attempt: int
    executor: str  # local | slurm | inline (`mvit train`)
    job_id: str | None
    step: int
    total_steps: int | None
    checkpoint_step: int
    metrics: dict[str, Any]  # the last `train` record
    evaluation: dict[str, Any]  # the last `evaluate` record

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.state}" + (f" ({self.detail})" if self.detail else "")]
        job = "" if self.job_id is None else f", job {self.job_id}"
        lines.append(f"attempt {self.attempt}, {self.executor}{job}; {self.run_dir}")
        total = "" if self.total_steps is None else f" of {self.total_steps}"
        saved = f"last checkpoint at step {self.checkpoint_step}" if self.checkpoint_step else "no checkpoint yet"
        lines.append(f"step {self.step}{total}, {saved}")
        for title, record in (("last metrics", self.metrics), ("last evaluation", self.evaluation)):
            shown = "  ".join(f"{key} {_short(value)}" for key, value in record.items() if key not in _NOT_SHOWN)
            if shown:
                lines.append(f"{title}: {shown}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Judgement:
    """What a run is doing, without its figures."""

    state: State
    detail: str  # why, in one line; empty when the state says it all
    attempt: int
    executor: str  # local | slurm | inline (`mvit train`) | none
    job_id: str | None


def judge(run: RunFolder) -> Judgement:
    """Find out the state of a run from its records and, where they are silent, from its processes or Slurm.

    For a Slurm job this asks squeue: do not call it in a tight loop. Raises RunFolderError when this is no run.
    """
    events = run.events()
    attempt = max((event["attempt"] for event in events), default=0)
    latest = [event for event in events if event["attempt"] == attempt]
    facts = {key: value for event in latest for key, value in event.items()}
    state, detail = _state(run, attempt, latest, facts)
    return Judgement(state, detail, attempt, str(facts.get("executor", "none")), facts.get("job_id"))


def run_state(run_dir: str | Path) -> RunState:
    """Return a run's state with its latest figures. Raises RunFolderError when the folder is not a run."""
    run = RunFolder(Path(run_dir))
    identity = run.identity()
    judgement = judge(run)
    records = list(read_json_lines(run.metrics_file))
    train = next((record for record in reversed(records) if record.get("kind") == "train"), {})
    evaluation = next((record for record in reversed(records) if record.get("kind") == "evaluate"), {})
    return RunState(
        run_dir=str(run.path),
        name=str(identity.get("name")),
        **asdict(judgement),
        step=int(train.get("step", 0)),
        total_steps=train.get("total_steps"),
        checkpoint_step=run.checkpoint_step(),
        metrics=train,
        evaluation=evaluation,
    )


def _state(run: RunFolder, attempt: int, latest: list[dict[str, Any]], facts: dict[str, Any]) -> tuple[State, str]:
    """Judge by the latest attempt: its end if recorded, else whether its processes or its job still live."""
    if not latest:
        return "failed", "its submission was not completed: no attempt is recorded"
    # The last one: a job that went back to the queue has an end, and a second if it is cancelled there.
    end = next((event for event in reversed(latest) if event["event"] == "end"), None)
    if end is not None:
        if end.get("requeued"):
            return "pending", f"requeued: {end['detail']}"
        return end["cause"], end.get("detail") or ""
    started = any(event["event"] == "start" for event in latest)
    running: State = "running" if started else "pending"
    if facts["executor"] == "slurm":
        queue = slurm_job_state(facts["job_id"])
        if queue is None:
            return running, "squeue is not available here: by the run's own records"
        if queue == "":
            return "failed", "Slurm no longer knows the job and it left no final record"
        return ("pending" if queue in _QUEUED else running), f"Slurm says {queue}"
    process = identity_from(facts["process"])
    assert process is not None
    if not is_local(process):
        return running, f"on {process.host} or before a reboot: by the run's own records"
    if is_alive(process) or any(is_alive_record(record) for record in run.rank_records(attempt)):
        return running, ""
    failure = first_failure(run, attempt)
    return "failed", "its processes are gone without a final record" if failure is None else failure.headline


def slurm_job_state(job_id: str) -> str | None:
    """Return squeue's word for a job, "" if it is not in the queue, None if squeue cannot be asked."""
    try:
        result = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%T"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if result.returncode != 0 and "Invalid job id" not in result.stderr:
        return None
    return result.stdout.strip()


def poll_interval_s(executor: str) -> float:
    """Return how often to ask for a run's state: Slurm's controller serves others too."""
    return 10.0 if executor == "slurm" else 0.3


def wait_for_end(run_dir: str | Path, timeout_s: float) -> RunState:
    """Wait until a run is stopped, failed or finished, at most `timeout_s`; return its state then."""
    run, deadline = RunFolder(Path(run_dir)), time.monotonic() + timeout_s
    while (now := judge(run)).state in ("pending", "running") and time.monotonic() < deadline:
        time.sleep(poll_interval_s(now.executor))
    return run_state(run_dir)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
