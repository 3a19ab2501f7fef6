"""Ending a run on request: `stop` lets it save first, `cancel` does not wait for that."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from launcher.ending import classify
from launcher.judgement import Judgement, judge, poll_interval_s
from launcher.lives import is_alive_record, last_sign_of_life, record_end
from launcher.processes import identity_from, send_signal
from launcher.run_folder import RunFolder, RunFolderError
from launcher.slurm_queue import ask_squeue
from launcher.status import RunState, run_state

_REQUEUE_WAIT_S = 10.0  # a requeue takes a second or two between the end of a life and the queue
_POLL_S = 0.5


def request_stop(run_dir: str | Path) -> str:
    """Ask a run to save at its next step boundary and end with exit code 85; return what was done.

    A job that waits in Slurm's queue is taken out of it. The request is also left as a file, so that a rank which is
    still starting finds it, and so does the next life if this one is being requeued at the moment. Raises
    RunFolderError when the run is not running, or runs where it cannot be reached from.
    """
    run, now, facts = _running(run_dir)
    mark = run.stop_file(now.attempt)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if facts["executor"] == "slurm":
        return _stop_in_slurm(run, now, str(facts["job_id"]))
    if facts["executor"] == "inline":
        _signal_or_raise(run, facts["process"], signal.SIGUSR2)
        return f"sent USR2 to process {facts['process']['pid']}; it saves and ends"
    sent = 0
    for record in run.rank_records(now.attempt):
        process = identity_from(record["process"])
        sent += process is not None and send_signal(process, signal.SIGUSR2)
    return f"sent USR2 to {sent} rank(s) of local job {facts['job_id']}; they save and end"


def wait_for_stop(run_dir: str | Path, timeout_s: float) -> RunState:
    """Wait until a run that was asked to stop is at rest, at most `timeout_s`; return its state then.

    If its last life was requeued before it heard of the stop, it is taken out of the queue.
    """
    run, deadline = RunFolder(Path(run_dir)), time.monotonic() + timeout_s
    while not (now := judge(run)).at_rest and time.monotonic() < deadline:
        if now.slurm is not None and now.slurm.waits and _leave_queue(run, now.attempt, now.slurm.job_id):
            break
        time.sleep(poll_interval_s(now.executor))
    return run_state(run_dir)


def cancel(run_dir: str | Path) -> str:
    """End a run at once and return what was done; raises RunFolderError as `request_stop` does.

    Nobody waits for a save. Ranks of Slurm's may manage one all the same: what is recorded here does not deny it, and
    their batch script or the ledger completes it.
    """
    run, now, facts = _running(run_dir)
    if facts["executor"] == "slurm":
        mark = run.stop_file(now.attempt)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()  # should its batch script live on, it does not requeue
        before = len(_ends(run, now.attempt))
        _slurm(["scancel", facts["job_id"]])
        if len(_ends(run, now.attempt)) == before:  # else its batch script was faster, which knows more
            _append_end(run, now.attempt, "cancelled", "cancelled by `mvit cancel`")
        told = "; its ranks may still save, until Slurm's KillWait is over" if now.state == "running" else ""
        return f"cancelled slurm job {facts['job_id']}{told}"
    mark = run.end_file(now.attempt)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()  # before the kill, so that no guard records a failure
    _signal_or_raise(run, facts["process"], signal.SIGKILL)  # a local job's guards end its ranks
    _append_end(run, now.attempt, "cancelled", "cancelled without a save")
    return f"cancelled {facts['executor']} job {facts['job_id']}"


def wait_until_gone(run_dir: str | Path, timeout_s: float) -> bool:
    """Wait until no process of a run that was cancelled is left; return whether that was so within `timeout_s`."""
    run, deadline = RunFolder(Path(run_dir)), time.monotonic() + timeout_s
    now = judge(run)
    while time.monotonic() < deadline:
        if now.executor == "slurm":
            found = ask_squeue([str(now.job_id)])
            left = found is None or not found[str(now.job_id)].is_gone
        else:
            left = any(is_alive_record(record) for record in run.rank_records(now.attempt))
        if not left:
            return True
        time.sleep(min(2.0, poll_interval_s(now.executor)))
    return False


def _stop_in_slurm(run: RunFolder, now: Judgement, job_id: str) -> str:
    deadline = time.monotonic() + _REQUEUE_WAIT_S
    while now.slurm is not None and (now.state == "pending" or now.slurm.state == "COMPLETING"):
        if now.slurm.waits and _leave_queue(run, now.attempt, job_id):
            return f"Slurm job {job_id} was waiting: taken out of the queue. Go on with: mvit resume {run.path}"
        if time.monotonic() > deadline:
            return f"Slurm job {job_id} is between two lives: it stops as soon as its ranks have started again"
        time.sleep(_POLL_S)
        now = judge(run)  # the life before ends, or it starts in this moment
        if now.at_rest:
            return f"Slurm job {job_id} has ended: {now.state}. {now.detail}".rstrip()
    try:
        _slurm(["scancel", f"--signal={signal.SIGUSR2.name.removeprefix('SIG')}", job_id])
    except RunFolderError:
        if now.slurm is None or now.slurm.state == "RUNNING":
            raise
        return f"Slurm says {now.slurm.state} of job {job_id}: it stops as soon as its ranks have started"
    return f"sent USR2 to Slurm job {job_id}; it saves and ends"


def _leave_queue(run: RunFolder, attempt: int, job_id: str) -> bool:
    """Cancel a job if it still waits in the queue, and record that; return False if it has started meanwhile."""
    _slurm(["scancel", "--state=PENDING", job_id])  # looked at by Slurm itself: never ends a life that has started
    found = ask_squeue([job_id])
    if found is None or not found[job_id].is_gone:
        return False
    known = {event["event"] for event in run.events() if event["attempt"] == attempt}
    if "start" in known and "end" not in known:  # Slurm requeued it by itself
        ending, when = classify(run, attempt, None), last_sign_of_life(run, attempt)
        record_end(run, attempt, ending, requeued=True, reason="Slurm requeued the job by itself", ended=when)
    when = "while it waited again" if "start" in known else "before it had started"
    _append_end(run, attempt, "user_stop", f"taken out of the queue by `mvit stop` {when}")
    return True


def _ends(run: RunFolder, attempt: int) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == "end" and event["attempt"] == attempt]


def _append_end(run: RunFolder, attempt: int, kind: str, detail: str) -> None:
    step = run.checkpoint_step()
    run.append_event(
        "end", attempt, cause="stopped", kind=kind, detail=detail, exit_code=None, requeued=False, checkpoint_step=step
    )


def _running(run_dir: str | Path) -> tuple[RunFolder, Judgement, dict[str, Any]]:
    run = RunFolder(Path(run_dir))
    run.identity()  # says so if this is no run
    now = judge(run)
    if now.at_rest:
        raise RunFolderError(f"{run_dir} is not running: it is {now.state}. {now.detail}".rstrip())
    events = [event for event in run.events() if event["attempt"] == now.attempt]
    return run, now, {key: value for event in events for key, value in event.items()}


def _signal_or_raise(run: RunFolder, record: dict[str, Any], signum: signal.Signals) -> None:
    process = identity_from(record)
    if process is None or not send_signal(process, signum):
        raise RunFolderError(
            f"{run.path} runs as process {record['pid']} on {record['host']}, which cannot be signalled from here: "
            f"log in there and use `mvit stop`, or `kill -USR2 {record['pid']}`."
        )


def _slurm(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunFolderError(f"`{' '.join(command)}`: Slurm is not installed here; use a login node.") from None
    if result.returncode != 0:
        raise RunFolderError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
