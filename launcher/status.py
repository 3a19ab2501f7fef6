"""What became of a run: its state, how far it is, and which rank failed first and why."""

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.preemption import EXIT_STOPPED
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
class Failure:
    """The rank that failed first in an attempt."""

    rank: int | None
    headline: str
    text: str  # the traceback, or what else is known


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


def is_alive_record(record: dict[str, Any]) -> bool:
    """Tell whether the rank of a record still runs, by its guard where it has one."""
    process = identity_from(record.get("guard") or record["process"])
    return process is not None and is_alive(process)


def describe_end(record: dict[str, Any]) -> str | None:
    """Return one sentence on a rank that did not end well, None for 0, 85 and ranks still running."""
    if "ended" not in record or record["exit_code"] in (0, EXIT_STOPPED):
        return None
    name = f"rank {record['rank']} (pid {record['pid']})"
    if record.get("ended_because"):
        return f"{name} was ended because {record['ended_because']}"
    if record["signal"] is not None:
        return f"{name} died: killed by {record['signal']}"
    return f"{name} died: exit code {record['exit_code']}"


def first_failure(run: RunFolder, attempt: int) -> Failure | None:
    """Find the rank that failed first, None if none did.

    A rank killed by a signal comes before any exception: the exceptions of its peers follow from its death, and not
    the other way round. Ranks that a guard ended because of another one are never the first.
    """
    records = [record for record in run.rank_records(attempt) if describe_end(record) is not None]
    own = [record for record in records if not record.get("ended_because")]
    errors = sorted(run.rank_errors(attempt), key=lambda error: error["time"])
    tracebacks = {error["rank"]: error["traceback"] for error in errors}
    for record in sorted(own, key=lambda record: record["ended"]):
        if record["signal"] is not None:
            return _failure_of(run, attempt, record, tracebacks)
    if errors:
        first = errors[0]
        headline = f"rank {first['rank']} (pid {first['pid']}) raised {first['type']}: {first['message']}"
        return Failure(first["rank"], headline, first["traceback"])
    for record in sorted(own or records, key=lambda record: record["ended"]):
        return _failure_of(run, attempt, record, tracebacks)
    return None


def failure_text(run: RunFolder, attempt: int) -> str:
    """Return what a person needs to read after a failure: the first failing rank, its traceback, its log."""
    failure = first_failure(run, attempt)
    if failure is not None:
        return f"{failure.headline}\n{failure.text}".rstrip()
    tail = _submitit_tail(run, attempt)
    return f"no rank left a record of a failure; see {run.attempt_dir(attempt)}" + (f"\n{tail}" if tail else "")


def close_attempt_if_over(attempt_dir: Path, world_size: int) -> None:
    """Append a local attempt's end once every rank has ended; of the guards that see it, one writes."""
    run, attempt = RunFolder(attempt_dir.parent.parent), int(attempt_dir.name.removeprefix("attempt_"))
    records = run.rank_records(attempt)
    if len(records) < world_size and not any(describe_end(record) for record in records):
        return  # a rank that has not started yet will see the end itself
    if any("ended" not in record and is_alive_record(record) for record in records):
        return
    try:
        run.end_file(attempt).touch(exist_ok=False)
    except FileExistsError:
        return
    codes = [record.get("exit_code") for record in records]
    if all(code == 0 for code in codes):
        cause, detail = "finished", ""
    elif all(code == EXIT_STOPPED for code in codes):
        cause, detail = "stopped", "stopped on request after a complete save"
    else:
        failure = first_failure(run, attempt)
        cause, detail = "failed", "ranks ended differently" if failure is None else failure.headline
    run.append_event(
        "end",
        attempt,
        cause=cause,
        detail=detail,
        exit_codes=codes,
        requeued=False,
        checkpoint_step=run.checkpoint_step(),
    )


def close_lost_attempts(run: RunFolder, before: int) -> None:
    """Append an end to earlier attempts that have none: a lost node or a kill -9 leaves nobody to write it."""
    events = run.events()
    ended = {event["attempt"] for event in events if event["event"] == "end"}
    for attempt in sorted({event["attempt"] for event in events} - ended):
        if attempt < before:
            run.append_event("end", attempt, cause="failed", detail="ended without a record", requeued=False)


def poll_interval_s(executor: str) -> float:
    """Return how often to ask for a run's state: Slurm's controller serves others too."""
    return 10.0 if executor == "slurm" else 0.3


def wait_for_end(run_dir: str | Path, timeout_s: float) -> RunState:
    """Wait until a run is stopped, failed or finished, at most `timeout_s`; return its state then."""
    run, deadline = RunFolder(Path(run_dir)), time.monotonic() + timeout_s
    while (now := judge(run)).state in ("pending", "running") and time.monotonic() < deadline:
        time.sleep(poll_interval_s(now.executor))
    return run_state(run_dir)


def _failure_of(run: RunFolder, attempt: int, record: dict[str, Any], tracebacks: dict[int, str]) -> Failure:
    rank = record["rank"]
    parts = [tracebacks.get(rank) or _tail(run.attempt_dir(attempt) / f"rank_{rank:04d}.log")]
    if record["signal"] == "SIGKILL":
        parts.append("nobody's `mvit cancel`: often the kernel's out-of-memory killer (see dmesg), or a kill -9")
    elif record["signal"] is None and not any(parts):
        parts.append(_submitit_tail(run, attempt))  # it did not come as far as its own log
    return Failure(rank, describe_end(record) or "", "\n".join(part for part in parts if part))


def _submitit_tail(run: RunFolder, attempt: int) -> str:
    files = [*sorted(run.submitit_dir(attempt).glob("*.err")), run.submitit_dir(attempt) / "controller.log"]
    return "\n".join(text for file in files if (text := _tail(file)))


def _tail(path: Path, num_lines: int = 20) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- end of {path}", *lines]) if lines else ""


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
