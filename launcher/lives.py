"""Closing lives: the end of an attempt on record, whoever is left to write it."""

from typing import Any

from launcher.ending import Ending, classify
from launcher.failure import describe_end
from launcher.preemption import EXIT_STOPPED
from launcher.processes import identity_from, is_alive
from launcher.run_folder import RunFolder
from launcher.say import say


def is_alive_record(record: dict[str, Any]) -> bool:
    """Tell whether the rank of a record still runs, by its guard where it has one."""
    process = identity_from(record.get("guard") or record["process"])
    return process is not None and is_alive(process)


def record_end(
    run: RunFolder, attempt: int, ending: Ending, *, requeued: bool, reason: str, exit_code: int | None = None
) -> None:
    """Append the end of a life to the ledger; on a full disk say so instead: the next life closes this one."""
    try:
        run.append_event(
            "end",
            attempt,
            **ending.facts(),
            reason=reason,
            exit_code=exit_code,
            requeued=requeued,
            checkpoint_step=run.checkpoint_step(),
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
        again = attempt + 1 in submitted
        if again and attempt not in started:
            ending = Ending("cancelled", "cancelled in the queue, before its ranks started")
        else:
            ending = classify(run, attempt, None)
        reason = "submitted again" if again else "Slurm itself sent the job back to the queue"
        record_end(run, attempt, ending, requeued=False, reason=reason)


def _attempts(run: RunFolder, kind: str) -> set[int]:
    return {event["attempt"] for event in run.events() if event["event"] == kind}
