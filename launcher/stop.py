"""Ending a run on request: `stop` lets it save first, `cancel` does not."""

import signal
import subprocess
from pathlib import Path
from typing import Any

from launcher.processes import identity_from, send_signal
from launcher.run_folder import RunFolder, RunFolderError
from launcher.status import run_state


def request_stop(run_dir: str | Path) -> str:
    """Ask a run to save at its next step boundary and end with exit code 85; return what was done.

    The request is also left as a file, so that a rank which is still starting finds it. Raises RunFolderError when the
    run is not running, or runs where it cannot be reached from.
    """
    run, facts = _running(run_dir)
    attempt = int(facts["attempt"])
    mark = run.stop_file(attempt)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if facts["executor"] == "slurm":
        _slurm(["scancel", f"--signal={signal.SIGUSR2.name.removeprefix('SIG')}", facts["job_id"]])
        return f"sent USR2 to Slurm job {facts['job_id']}; it saves and ends"
    if facts["executor"] == "inline":
        _signal_or_raise(run, facts["process"], signal.SIGUSR2)
        return f"sent USR2 to process {facts['process']['pid']}; it saves and ends"
    sent = 0
    for record in run.rank_records(attempt):
        process = identity_from(record["process"])
        sent += process is not None and send_signal(process, signal.SIGUSR2)
    return f"sent USR2 to {sent} rank(s) of local job {facts['job_id']}; they save and end"


def cancel(run_dir: str | Path) -> str:
    """End a run at once, without a save; return what was done. Raises RunFolderError as `request_stop` does."""
    run, facts = _running(run_dir)
    attempt = int(facts["attempt"])
    mark = run.end_file(attempt)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()  # before the kill, so that no guard records a failure
    if facts["executor"] == "slurm":
        _slurm(["scancel", facts["job_id"]])
    else:
        _signal_or_raise(run, facts["process"], signal.SIGKILL)  # a local job's guards end its ranks
    run.append_event("end", attempt, cause="stopped", detail="cancelled without a save", requeued=False)
    return f"cancelled {facts['executor']} job {facts['job_id']}"


def _running(run_dir: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    state = run_state(run_dir)
    if state.state not in ("pending", "running"):
        raise RunFolderError(f"{run_dir} is not running: it is {state.state}. {state.detail}".rstrip())
    run = RunFolder(Path(run_dir))
    events = [event for event in run.events() if event["attempt"] == state.attempt]
    return run, {key: value for event in events for key, value in event.items()}


def _signal_or_raise(run: RunFolder, record: dict[str, Any], signum: signal.Signals) -> None:
    process = identity_from(record)
    if process is None or not send_signal(process, signum):
        raise RunFolderError(
            f"{run.path} runs as process {record['pid']} on {record['host']}, which cannot be signalled from here: "
            f"log in there and use `mvit stop`, or `kill -USR2 {record['pid']}`."
        )


def _slurm(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunFolderError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
