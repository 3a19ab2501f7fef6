"""Closing lives: the end of an attempt on record, whoever is left to write it."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from launcher.ending import Ending, classify, finished_step
from launcher.failure import describe_end
from launcher.preemption import EXIT_STOPPED
from launcher.processes import identity_from, is_alive
from launcher.run_folder import RunFolder
from launcher.say import say
from launcher.slurm_queue import CANCELLED, final_state, final_time

SOMEBODY_CANCELLED = "somebody cancelled the job"


def is_alive_record(record: dict[str, Any]) -> bool:
    """Tell whether the rank of a record still runs, by its guard where it has one."""
    process = identity_from(record.get("guard") or record["process"])
    return process is not None and is_alive(process)


def record_end(
    run: RunFolder,
    attempt: int,
    ending: Ending,
    *,
    requeued: bool,
    reason: str,
    exit_code: int | None = None,
    ended: float | None = None,
) -> None:
    """Append the end of a life to the ledger; on a full disk say so instead: the next life closes this one.

    `ended` is when that was (seconds since the epoch), if not now.
    """
    try:
        run.append_event(
            "end",
            attempt,
            **ending.facts(),
            reason=reason,
            exit_code=exit_code,
            requeued=requeued,
            checkpoint_step=run.checkpoint_step(),
            **({} if ended is None else {"ended": ended}),
        )
    except OSError as error:
        say(f"the end of life {attempt} is not recorded: {error}")


def close_attempt_if_over(run: RunFolder, attempt: int, world_size: int) -> None:
    """Append a local attempt's end once every rank has ended; of the guards that see it, one writes."""
    records = run.rank_records(attempt)
    if len(records) < world_size and not any(describe_end(record) for record in records):
        return  # a rank that has not started yet will see the end itself
    if any("ended" not in record and is_alive_record(record) for record in records):
        return
    try:
        run.end_file(attempt).touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError as error:
        say(f"the end of life {attempt} is not recorded: {error}")
        return
    codes = [record.get("exit_code") for record in records]
    whole = next((code for code in (0, EXIT_STOPPED) if all(one == code for one in codes)), None)
    ending = classify(run, attempt, 1 if whole is None else whole)
    record_end(run, attempt, ending, requeued=False, reason="a local job is not restarted by itself", exit_code=whole)


def close_lost_attempts(run: RunFolder, before: int) -> None:
    """Append an end to earlier attempts that have none: a lost node or a requeue by Slurm leaves nobody to write it."""
    ended, started, submitted = _attempts(run, "end"), _attempts(run, "start"), _attempts(run, "submit")
    for attempt in sorted((started | submitted) - ended):
        if attempt >= before:
            continue
        job_id, again = _slurm_job(run, attempt), attempt + 1 in submitted
        by_slurm = not again and job_id is not None and job_id == os.environ.get("SLURM_JOB_ID")
        if by_slurm:  # this is a life of the same job
            reason = "Slurm itself sent the job back to the queue"
        else:
            reason = "submitted again" if again else "nobody was left to record it"
            if job_id is not None and final_state(job_id) in CANCELLED:
                record_cancelled(run, attempt, job_id)
                continue
        if again and attempt not in started:
            ending = Ending("cancelled", "cancelled in the queue, before its ranks started")
        else:
            ending = classify(run, attempt, None)
        when = last_sign_of_life(run, attempt)
        record_end(run, attempt, ending, requeued=by_slurm, reason=reason, ended=when)


def unrecorded_cancel(run: RunFolder, attempt: int, job_id: str) -> dict[str, Any]:
    """Return the end event that an attempt lacks whose job was cancelled in Slurm, with nobody left to record it."""
    ending, when = _cancelled(run, attempt, job_id)
    facts = {"reason": SOMEBODY_CANCELLED, "exit_code": None, "requeued": False}
    return {"event": "end", "attempt": attempt, "time": when, **ending.facts(), **facts, "ended": when} | {
        "checkpoint_step": run.checkpoint_step()
    }


def record_cancelled(run: RunFolder, attempt: int, job_id: str) -> None:
    """Append that event."""
    ending, when = _cancelled(run, attempt, job_id)
    record_end(run, attempt, ending, requeued=False, reason=SOMEBODY_CANCELLED, ended=when)


def _cancelled(run: RunFolder, attempt: int, job_id: str) -> tuple[Ending, float]:
    """Say how and when it ended: a life at its last sign of life, a job that waited when Slurm says it left."""
    kinds = {event["event"] for event in run.events() if event["attempt"] == attempt}
    if "start" in kinds and "end" not in kinds:
        records = run.rank_records(attempt)
        detail = f"cancelled in Slurm (scancel){saved_in_words(records)}"
        step = max((step for record in records if (step := finished_step(record)) is not None), default=None)
        return Ending("cancelled", detail, step=step), last_sign_of_life(run, attempt)
    when = "while it waited again" if "start" in kinds else "before its ranks started"
    known = last_sign_of_life(run, attempt)
    return Ending("cancelled", f"cancelled in the queue, {when}"), max(known, final_time(job_id) or known)


def saved_in_words(records: Sequence[dict[str, Any]]) -> str:
    """Say it if all ranks saved when they were told of the end."""
    saved = records and all(record.get("exit_code") == EXIT_STOPPED for record in records)
    return ", everything saved" if saved else ""


def last_sign_of_life(run: RunFolder, attempt: int) -> float:
    """Return when an attempt was last heard of: by its events, the records of its ranks, or what they printed."""
    times = [event["time"] for event in run.events() if event["attempt"] == attempt]
    for record in run.rank_records(attempt):
        told = [signal.get("time") for signal in record.get("signals", [])]
        told += [record.get(key) for key in ("started", "last_beat", "ended")]
        times += [moment for moment in told if moment is not None]
    for log in run.attempt_dir(attempt).glob("rank_*.log"):
        with suppress(OSError):
            times.append(log.stat().st_mtime)
    now = time.time()
    return min(now, max(times, default=now))  # the clock of a file server may be ahead


def _slurm_job(run: RunFolder, attempt: int) -> str | None:
    """Return the Slurm job that an attempt belonged to, None if it ran elsewhere."""
    own = [event for event in run.events() if event["attempt"] == attempt and event["event"] in ("submit", "start")]
    jobs = [str(event.get("job_id")) for event in own if event.get("executor") == "slurm"]
    return jobs[-1] if jobs else None


def _attempts(run: RunFolder, kind: str) -> set[int]:
    return {event["attempt"] for event in run.events() if event["event"] == kind}
