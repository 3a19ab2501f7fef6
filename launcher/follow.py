"""Staying with a run: its progress as its records grow, and its outcome as an exit code."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder, parse_json_line
from launcher.status import RunState, failure_text, run_state
from launcher.stop import request_stop
from mvit.progress import ProgressDisplay

EXIT_CODES = {"finished": 0, "stopped": EXIT_STOPPED, "failed": 1}
EXIT_DETACHED = 130  # Ctrl-C here; the run itself goes on


class RecordTail:
    """Reads the records that were added to a run's metrics since the last look.

    A life that starts again rewrites the file without the steps it will repeat; so records are known by their time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset, self._newest = -1, 0, float("-inf")

    def read(self) -> list[dict[str, Any]]:
        """Return the new records, oldest first; an unfinished line is left for the next look."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            block = file.read()
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [record for line in whole.splitlines() if (record := parse_json_line(line)) is not None]
        new = [record for record in records if record.get("time", float("inf")) > self._newest]
        self._newest = max([self._newest, *(record["time"] for record in new if "time" in record)])
        return new


def follow(run_dir: Path, poll_s: float = 0.3) -> int:
    """Show a run's progress until it ends; return 0 finished, 85 stopped on request, 1 failed, 130 detached.

    A failed run's first failing rank and its traceback are printed to stderr. Ctrl-C asks whether to leave the run
    going; it is never ended without an answer.
    """
    run = RunFolder(run_dir)
    tail = RecordTail(run.metrics_file)
    earlier = [record for record in tail.read() if record.get("kind") == "train"]
    asked = False
    while True:
        try:
            with ProgressDisplay() as display:
                for record in earlier[-1:]:
                    display.update(record)
                state = _until_end(run_dir, tail, display, poll_s)
        except KeyboardInterrupt:
            if asked or _leave_it_running(run_dir):
                print(
                    f"{run_dir} goes on. Watch it again: mvit status {run_dir} --follow; stop it: mvit stop {run_dir}"
                )
                return EXIT_DETACHED
            asked, earlier = True, []
            continue
        return _report(run, state)


def _until_end(run_dir: Path, tail: RecordTail, display: ProgressDisplay, poll_s: float) -> RunState:
    shown = None
    while True:
        state = run_state(run_dir)  # before the records: those written before an end are then all shown
        for record in tail.read():
            display.update(record)
        if state.state in EXIT_CODES:
            return state
        if (state.state, state.attempt) != shown:
            shown = (state.state, state.attempt)
            display.note(f"{state.name}: {state.state}, attempt {state.attempt}")
        time.sleep(poll_s)


def _report(run: RunFolder, state: RunState) -> int:
    print(str(state), flush=True)
    if state.state == "failed":
        print(failure_text(run, state.attempt), file=sys.stderr, flush=True)
    elif state.state == "stopped":
        print(f"continue with: mvit resume {run.path}", flush=True)
    return EXIT_CODES[state.state]


def _leave_it_running(run_dir: Path) -> bool:
    """Ask; without a terminal to ask on, leave the run alone."""
    if not sys.stdin.isatty():
        return True
    try:
        answer = input("\nLeave the run going? [Y: leave / s: save and stop] ")
    except (KeyboardInterrupt, EOFError):
        return True
    if answer.strip().lower() not in ("s", "stop", "n", "no"):
        return True
    print(request_stop(run_dir))
    return False
