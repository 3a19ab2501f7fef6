"""Closing lives: the end of an attempt on record, whoever is left to write it."""

from pathlib import Path
from typing import Any

from launcher.failure import describe_end, first_failure
from launcher.preemption import EXIT_STOPPED
from launcher.processes import identity_from, is_alive
from launcher.run_folder import RunFolder


def is_alive_record(record: dict[str, Any]) -> bool:
    """Tell whether the rank of a record still runs, by its guard where it has one."""
    process = identity_from(record.get("guard") or record["process"])
    return process is not None and is_alive(process)


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
