"""Staying with a run: its progress as its records grow, and its outcome as an exit code."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.evaluation_job import evaluates
from launcher.judgement import Judgement, judge_now_and_when_again
from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder, parse_json_line
from launcher.status import run_state, start_up
from launcher.stop import request_stop
from launcher.why import failure_details
from mvit.progress import ProgressDisplay

EXIT_CODES = {"finished": 0, "stopped": EXIT_STOPPED, "failed": 1}
EXIT_DETACHED = 130  # Ctrl-C here; the run itself goes on
_POLL_S = 0.3


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


def follow(run_dir: Path, as_json: bool = False) -> int:
    """Show a run's progress until it ends; return 0 finished, 85 stopped on request, 1 failed, 130 detached.

    A failed run's first failing rank and its traceback are printed to stderr. With `as_json` the progress goes there
    too, and the final state to stdout. Ctrl-C asks whether to leave the run going; it is never ended unasked.
    """
    run = RunFolder(run_dir)
    run.identity()  # says so if this is no run
    console = Console(stderr=as_json)
    tail = RecordTail(run.metrics_file)
    earlier = [record for record in tail.read() if record.get("kind") == "train"]
    while True:
        try:
            with ProgressDisplay(console=console) as display:
                for record in earlier[-1:]:
                    display.update(record)
                _until_end(run, tail, display)
            return _report(run, console, as_json)
        except KeyboardInterrupt:
            earlier = []
            if _leave_it_running(run_dir):
                text = (
                    f"{run_dir} goes on. Watch it again: mvit status {run_dir} --follow; stop it: mvit stop {run_dir}"
                )
                console.print(text, markup=False, soft_wrap=True)
                return EXIT_DETACHED


def _until_end(run: RunFolder, tail: RecordTail, display: ProgressDisplay) -> None:
    (judgement, again_at), shown, logs, told_of = judge_now_and_when_again(run), "", False, 0.0
    while True:
        if time.monotonic() >= again_at:
            attempt = judgement.attempt
            judgement, again_at = judge_now_and_when_again(run)
            logs = logs and judgement.state == "running" and judgement.attempt == attempt
        for record in tail.read():  # after the judgement: what was written before an end is then all shown
            display.update(record)
            logs = logs or record.get("kind") == "train"
        if judgement.state in EXIT_CODES:
            return
        if told_of != again_at:  # a new judgement
            told_of = again_at
            if (text := _doing(run, judgement)) != shown and not (shown and logs):  # records say more, if there are any
                shown = text
                display.note(text)
        time.sleep(_POLL_S)


def _doing(run: RunFolder, judgement: Judgement) -> str:
    """Say what a run does, as `mvit status` knows it, without the times that change at every look."""
    now = f"{judgement.state}, attempt {judgement.attempt}"
    doing = "" if judgement.state == "running" and judgement.slurm and not judgement.slurm.waits else judgement.detail
    if judgement.state == "running" and not evaluates(run):
        doing = start_up([event for event in run.events() if event["attempt"] == judgement.attempt]) or judgement.detail
    return f"{now}: {doing}" if doing else now


def _report(run: RunFolder, console: Console, as_json: bool) -> int:
    state = run_state(run.path)
    if state.state == "failed":
        console.print(state.body, markup=False, highlight=False, soft_wrap=True)
        print(f"{state.headline}\n{failure_details(run, state)}".rstrip(), file=sys.stderr, flush=True)
    else:
        console.print(str(state), markup=False, highlight=False, soft_wrap=True)
    if state.state == "stopped":
        console.print(f"continue with: mvit resume {run.path}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(state.to_dict()), flush=True)
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
