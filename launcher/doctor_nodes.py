"""`mvit doctor --submit`: a job of two minutes on the nodes of a real one, awaited and judged."""

import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cluster import ClusterConfig, ClusterError, Placement
from launcher.doctor_job import DoctorJob
from launcher.doctor_report import NodesReport
from launcher.doctor_verdict import RankEnd, judge
from launcher.processes import ProcessIdentity, free_port, identify, is_alive, send_signal
from launcher.run_folder import RunFolder, read_records, write_json
from launcher.slurm import expand_hostlist
from launcher.slurm_queue import ask_squeue
from launcher.snapshot import take_snapshot

if TYPE_CHECKING:
    from submitit import Executor

    from mvit.config import RunConfig

_LIMIT_MIN = 2
_AFTER_LIMIT_S = 60.0  # Slurm may be so late in ending a job
_SETTLE_S = 3.0  # a shared file system shows the last reports a moment after the job's end
_LEAVE_S = 20.0
_POLL_S = 1.0
Tell = Callable[[str], None]


class DoctorError(ValueError):
    """A job on the nodes that could not be run to its end."""


@dataclass(frozen=True)
class _Started:
    """The job on its way."""

    run: RunFolder
    job_id: str
    process: ProcessIdentity | None  # the controller of a local job


def check_nodes(
    cluster: ClusterConfig,
    placement: Placement,
    config: "RunConfig | None",
    output_dir: Path,
    *,
    queue_timeout_s: float,
    tell: Tell,
) -> NodesReport:
    """Run the job, wait for it and judge every node; raises DoctorError if it does not start in time.

    Whatever ends the waiting, Ctrl-C for one, ends the job, too.
    """
    run = RunFolder((output_dir / f"doctor-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}").absolute())
    run.attempt_dir(1).mkdir(parents=True)
    run.submitit_dir(1).mkdir(parents=True)
    take_snapshot(run.code_dir)
    job = DoctorJob(
        run.path, Path.cwd(), None if config is None else config.data.train, free_port(), cluster.cpus_per_rank
    )
    started = _start(run, job, cluster, placement)
    tell(f"{cluster.executor} job {started.job_id} on {placement.nodes} node(s), at most {_LIMIT_MIN} minutes")
    try:
        nodes = _wait(started, placement, queue_timeout_s, tell)
        _let_it_end(started)
    finally:
        if _phase(started, [])[0] != "over":
            _cancel(started)
    reports = read_records(run.path, "rank_*.json")
    verdicts = judge(reports, placement, nodes, _ends(run, reports, placement))
    report = NodesReport(str(run.path), started.job_id, verdicts)
    write_json(run.path / "report.json", asdict(report))
    shutil.rmtree(run.code_dir)
    return report


def _start(run: RunFolder, job: DoctorJob, cluster: ClusterConfig, placement: Placement) -> _Started:
    """Submit as a real run is submitted, apart from the time limit and from what follows its end."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from launcher.executors import detached, local_executor, slurm_executor

    brief = cluster.model_copy(update={"timeout_min": _LIMIT_MIN, "signal_delay_s": 30, "requeue": False})
    executor: Executor
    try:
        if cluster.executor == "local":
            executor = local_executor(run, 1, brief, placement)
            with detached(run.submitit_dir(1) / "controller.log"):
                job_id = executor.submit(job).job_id
            return _Started(run, job_id, identify(int(job_id)))
        executor = slurm_executor(run, 1, "mvit-doctor", brief, placement)
        # One rank that fails must not end the others, which may be in the middle of a finding.
        executor.update_parameters(teardown=None, srun_args=["--kill-on-bad-exit=0"])
        return _Started(run, executor.submit(job).job_id, None)
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise ClusterError(f"the submission was refused: {error}") from error


def _wait(started: _Started, placement: Placement, queue_timeout_s: float, tell: Tell) -> list[str]:
    """Wait until every rank has reported, or the job is over; return the names of the job's nodes."""
    submitted, began = time.monotonic(), None
    nodes: list[str] = []
    told, ended = "", None
    while True:
        reports = read_records(started.run.path, "rank_*.json")
        done, now = sum(report["done"] for report in reports), time.monotonic()
        if done == placement.world_size or (ended is not None and now > ended + _SETTLE_S):
            return nodes
        phase, text = _phase(started, nodes)
        if phase == "queued" and now > submitted + queue_timeout_s:
            raise DoctorError(
                f"job {started.job_id} is still queued after {queue_timeout_s:.0f} s, and was cancelled. {text}. "
                "Wait longer with --timeout, or ask for fewer nodes."
            )
        began = now if began is None and phase != "queued" else began
        ended = now if ended is None and phase == "over" else ended
        if began is not None and now > began + _LIMIT_MIN * 60 + _AFTER_LIMIT_S:
            return nodes
        if phase == "running":
            text = f"running: {len(reports)} of {placement.world_size} ranks have begun, {done} are done"
        if text and text != told:
            tell(f"{now - submitted:4.0f} s  {text}")
            told = text
        time.sleep(_POLL_S)


def _let_it_end(started: _Started) -> None:
    """Give ranks that have reported a moment to leave by themselves."""
    end = time.monotonic() + _LEAVE_S
    while time.monotonic() < end and _phase(started, [])[0] != "over":
        time.sleep(_POLL_S)


def _phase(started: _Started, nodes: list[str]) -> tuple[str, str]:
    """Return whether the job is queued, running or over, with a line about it; fills in its nodes once known."""
    if started.process is not None:
        return ("running" if is_alive(started.process) else "over"), ""
    answer = ask_squeue([started.job_id])
    if answer is None:
        return "unknown", "squeue does not answer"
    job = answer[started.job_id]
    if job.is_gone or job.state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"):
        return "over", f"the job is over ({job.state or 'no longer in the queue'})"
    if job.waits or job.state == "CONFIGURING":
        return "queued", f"queued: {job.in_words(first_life=True)}"
    if not nodes and job.nodes:
        nodes += expand_hostlist(job.nodes) or ()
    return "running", ""


def _cancel(started: _Started) -> None:
    if started.process is not None:
        send_signal(started.process, signal.SIGKILL)  # the guards end their ranks
        return
    result = subprocess.run(["scancel", started.job_id], capture_output=True, text=True, timeout=30)
    if result.returncode != 0 and "complet" not in result.stderr:  # it may have ended in between
        raise DoctorError(f"job {started.job_id} could not be cancelled: {result.stderr.strip()}")


def _ends(run: RunFolder, reports: list[dict[str, Any]], placement: Placement) -> dict[int, RankEnd]:
    """Say how the ranks without a complete report ended: by their guards' records, or the end of what they printed."""
    complete = {report["rank"] for report in reports if report["done"]}
    records = {record["rank"]: record for record in run.rank_records(1)}
    ends = {}
    for rank in range(placement.world_size):
        if rank in complete:
            continue
        record = records.get(rank, {})
        log = _last_line(run, rank)
        facts = [
            f"killed by {record['signal']}" if record.get("signal") else "",
            f"exit code {record['exit_code']}" if record.get("exit_code") else "",
            f"ended because {record['ended_because']}" if record.get("ended_because") else "",
            f"it said: {log}" if log else "",
        ]
        told = ", ".join(fact for fact in facts if fact) or "nothing is known of it"
        ends[rank] = RankEnd(told, for_another=bool(record.get("ended_because")))
    return ends


def _last_line(run: RunFolder, rank: int) -> str:
    for file in sorted(run.submitit_dir(1).glob(f"*_{rank}_log.err")):
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:300]
    return ""
