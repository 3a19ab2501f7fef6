"""Why an attempt ended: which rank failed first, with its traceback or signal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.fired_faults import fired_faults
from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder

KILL_HINT = "nobody's `mvit cancel`: often the kernel's out-of-memory killer (see dmesg), or a kill -9"


@dataclass(frozen=True)
class Failure:
    """The rank that failed first in an attempt."""

    rank: int | None
    headline: str
    text: str  # the traceback, or what else is known
    time: float | None = None  # seconds since the epoch
    is_signal: bool = False


def describe_end(record: dict[str, Any]) -> str | None:
    """Return one sentence on a rank that did not end well, None for 0, 85 and ranks still running."""
    if "ended" not in record or record["exit_code"] in (0, EXIT_STOPPED):
        return None
    name = f"{_name(record['rank'], record.get('node'))} (pid {record['pid']})"
    if record.get("ended_because"):
        return f"{name} was ended because {record['ended_because']}"
    if record["signal"] is not None:
        return f"{name} died: killed by {record['signal']}"
    return f"{name} died: exit code {record['exit_code']}"


def first_failure(run: RunFolder, attempt: int) -> Failure | None:
    """Find the rank that failed first, None if none did.

    A rank killed by a signal comes before any exception: the exceptions of its peers follow from its death, and not
    the other way round. An abort is no such signal, libraries end a rank that way when a peer is gone. Ranks that a
    guard ended because of another one are never the first.
    """
    records = [record for record in run.rank_records(attempt) if describe_end(record) is not None]
    own = sorted((r for r in records if not r.get("ended_because")), key=lambda record: record["ended"])
    errors = sorted(run.rank_errors(attempt), key=lambda error: error["time"])
    tracebacks = {error["rank"]: error["traceback"] for error in errors}
    for record in own:
        if record["signal"] not in (None, "SIGABRT"):
            return _failure_of(run, attempt, record, tracebacks)
    aborted = [record for record in own if record["signal"] == "SIGABRT"]
    if errors and not (aborted and aborted[0]["ended"] < errors[0]["time"]):
        first = errors[0]
        name = _name(first["rank"], first.get("node"))
        headline = f"{name} (pid {first['pid']}) raised {first['type']}: {first['message']}"
        return Failure(first["rank"], headline, first["traceback"], first["time"])
    for record in aborted or own or sorted(records, key=lambda record: record["ended"]):
        return _failure_of(run, attempt, record, tracebacks)
    return None


def failure_text(run: RunFolder, attempt: int) -> str:
    """Return what a person needs to read after a failure: the first failing rank, its traceback, its log."""
    failure = first_failure(run, attempt)
    if failure is not None:
        return f"{failure.headline}\n{failure.text}".rstrip()
    tail, folder = _submitit_tail(run, attempt), run.attempt_dir(attempt)
    written = folder.is_dir() and any(folder.iterdir())
    told = (
        f"no rank left a record of a failure; see {folder}" if written else "no rank came so far as to leave a record"
    )
    return f"{told}\n{tail}" if tail else told


def _failure_of(run: RunFolder, attempt: int, record: dict[str, Any], tracebacks: dict[int, str]) -> Failure:
    rank = record["rank"]
    parts = [tracebacks.get(rank) or _tail(run.attempt_dir(attempt) / f"rank_{rank:04d}.log")]
    drills = fired_faults(run, [record])
    parts += map(str, drills)
    if record["signal"] == "SIGKILL" and not any(drill.is_kill for drill in drills):
        parts.append(KILL_HINT)
    elif record["signal"] is None and not any(parts):
        parts.append(_submitit_tail(run, attempt))  # it did not come as far as its own log
    text = "\n".join(part for part in parts if part)
    return Failure(rank, describe_end(record) or "", text, record["ended"], record["signal"] is not None)


def _name(rank: int, node: str | None) -> str:
    return f"rank {rank}" + (f" on {node}" if node else "")


def _submitit_tail(run: RunFolder, attempt: int) -> str:
    files = [*sorted(run.submitit_dir(attempt).glob("*.err")), run.submitit_dir(attempt) / "controller.log"]
    return "\n".join(text for file in files if (text := _tail(file)))


def _tail(path: Path, num_lines: int = 20) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- end of {path}", *lines]) if lines else ""
