"""What the batch script does when its ranks have ended: requeue the job or let it end, by exit code and progress."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.failure import first_failure
from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder


@dataclass(frozen=True)
class Decision:
    """What becomes of a batch job after one life, and why."""

    requeue: bool
    cause: str  # finished | stopped | failed
    reason: str


def decide(
    exit_code: int,
    *,
    user_stop: bool,
    may_requeue: bool,
    failures_without_progress: int,
    max_failures_without_progress: int,
) -> Decision:
    """Decide after a life of a batch job that ended with `exit_code` (the highest of its ranks).

    `failures_without_progress` counts the failed lives in a row that left no newer checkpoint, this one included.
    Stops on request are not counted: preemptions are free.
    """
    if exit_code == 0:
        return Decision(False, "finished", "the run is complete")
    if exit_code == EXIT_STOPPED:
        if user_stop:
            return Decision(False, "stopped", "stopped by `mvit stop` after a complete save")
        return Decision(may_requeue, "stopped", "stopped on request after a complete save")
    if not may_requeue:
        return Decision(False, "failed", f"exit code {exit_code}; the cluster file says requeue: false")
    if failures_without_progress >= max_failures_without_progress:
        return Decision(
            False,
            "failed",
            f"exit code {exit_code}; {failures_without_progress} failed lives in a row without a newer checkpoint "
            f"(max_failures_without_progress={max_failures_without_progress})",
        )
    return Decision(True, "failed", f"exit code {exit_code}; trying again from the newest checkpoint")


def count_failures_without_progress(events: Sequence[dict[str, Any]], step_now: int) -> int:
    """Count the failed lives at the end of the record, the current one included, since a checkpoint was published.

    `step_now` is the newest checkpoint's step; a life made progress if it is above the one the life started with.
    """
    starts = {event["attempt"]: event for event in events if event["event"] == "start"}
    causes = {event["attempt"]: event["cause"] for event in events if event["event"] == "end"}
    last = max((event["attempt"] for event in events), default=0)
    count, step_after = 0, step_now
    for attempt in range(last, 0, -1):
        step_before = starts[attempt]["checkpoint_step"] if attempt in starts else step_after
        if step_after > step_before or causes.get(attempt, "failed") != "failed":
            break
        count, step_after = count + 1, step_before
    return count


def after_life(
    run: RunFolder, attempt: int, exit_code: int, *, may_requeue: bool, max_failures_without_progress: int
) -> Decision:
    """Close an attempt in the batch script: decide, and append its end to attempts.jsonl."""
    decision = decide(
        exit_code,
        user_stop=run.stop_file(attempt).exists(),
        may_requeue=may_requeue,
        failures_without_progress=count_failures_without_progress(run.events(), run.checkpoint_step()),
        max_failures_without_progress=max_failures_without_progress,
    )
    failure = first_failure(run, attempt) if decision.cause == "failed" else None
    run.append_event(
        "end",
        attempt,
        cause=decision.cause,
        exit_code=exit_code,
        requeued=decision.requeue,
        checkpoint_step=run.checkpoint_step(),
        detail=decision.reason if failure is None else f"{failure.headline} ({decision.reason})",
    )
    return decision


def is_orphan(job_id: str, restart_count: int) -> bool:
    """Tell whether Slurm already runs a later life of this job: its node was lost, but this script lives on."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    restarts = [word.partition("=")[2] for word in shown.split() if word.startswith("Restarts=")]
    return restarts != [str(restart_count)]


def main(arguments: Sequence[str]) -> int:
    """Run at the end of the batch script: return 0 when the script shall requeue its job, 1 when not.

    Arguments: RUN_DIR FIRST_ATTEMPT EXIT_CODE MAY_REQUEUE(0|1) MAX_FAILURES_WITHOUT_PROGRESS
    """
    run_dir, first_attempt, exit_code, may_requeue, max_failures = arguments
    restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if is_orphan(os.environ["SLURM_JOB_ID"], restart_count):
        print(f"life {restart_count} of this job was given up by Slurm: it neither requeues nor records anything")
        return 1
    decision = after_life(
        RunFolder(Path(run_dir)),
        int(first_attempt) + restart_count,
        int(exit_code),
        may_requeue=may_requeue == "1",
        max_failures_without_progress=int(max_failures),
    )
    print(f"{decision.cause}: {decision.reason}; {'requeue' if decision.requeue else 'no requeue'}")
    return 0 if decision.requeue else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
