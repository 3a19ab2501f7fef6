"""Run folders written by hand, as the launcher and the trainer write them, and a Slurm of shell scripts."""

import json
import os
import time
from pathlib import Path

import pytest

from launcher.processes import identify
from launcher.run_folder import RunFolder, append_json_line, rank_file, write_json


def create(path: Path) -> RunFolder:
    """Make an empty run folder."""
    run = RunFolder(path)
    write_json(run.run_file, {"name": path.name, "id": "x", "created": "today"})
    return run


def event(run: RunFolder, name: str, attempt: int, at: float, **facts: object) -> None:
    """Append an event that happened `at` seconds from now; negative: ago."""
    append_json_line(run.attempts_file, {"event": name, "attempt": attempt, "time": time.time() + at, **facts})


def start(run: RunFolder, attempt: int, at: float, hosts: tuple[str, ...] = ("node1",), **facts: object) -> None:
    """Append a start of a life in this very process."""
    own = identify(os.getpid())
    assert own is not None
    given = {"executor": "local", "job_id": "7", "world_size": 2, "gpus": 0, "process": own.to_dict()}
    event(run, "start", attempt, at, **given | {"checkpoint_step": 0, "hosts": list(hosts)} | facts)


def figures(run: RunFolder, kind: str, step: int, at: float, **values: object) -> None:
    """Append a record to metrics.jsonl."""
    record = {"kind": kind, "step": step, "total_steps": 400, "time": time.time() + at, **values}
    append_json_line(run.metrics_file, record)


def rank(run: RunFolder, attempt: int, number: int, **facts: object) -> None:
    """Write the record of a rank that has ended."""
    record: dict[str, object] = {
        "rank": number,
        "world_size": 2,
        "pid": 100 + number,
        "process": None,
        "ended": time.time(),
    }
    write_json(
        rank_file(run.attempt_dir(attempt), number, ".json"), record | {"exit_code": None, "signal": None} | facts
    )


def error(run: RunFolder, attempt: int, number: int, message: str) -> None:
    """Write the exception that ended a rank, and its record."""
    text = f'Traceback (most recent call last):\n  File "train.py", line 3, in step\nArithmeticError: {message}\n'
    facts = {"rank": number, "pid": 100 + number, "time": time.time(), "type": "ArithmeticError", "message": message}
    write_json(rank_file(run.attempt_dir(attempt), number, ".error.json"), facts | {"traceback": text})
    rank(run, attempt, number, exit_code=86)


def log(run: RunFolder, attempt: int, number: int, text: str) -> Path:
    """Append to the log of a rank."""
    path = rank_file(run.attempt_dir(attempt), number, ".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


def tool(path: Path, body: str) -> None:
    """Write a command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


class FakeSlurm:
    """Commands first in PATH that answer from files: `jobs` is what squeue prints, line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        log_call = f'echo "$(basename $0) $*" >> {folder}/calls'
        jobs = f"{folder}/jobs"
        tool(
            folder / "squeue",
            f"{log_call}\n[ -e {jobs} ] && cat {jobs}\nnext=$(ls {folder}/next.* 2>/dev/null | head -1)\n"
            f'[ -n "$next" ] && mv "$next" {jobs}\nexit 0',
        )
        tool(folder / "scontrol", f"{log_call}\ncat {folder}/ended 2>/dev/null")
        tool(folder / "sacct", f"{log_call}\ncat {folder}/sacct.txt 2>/dev/null")
        tool(
            folder / "scancel",
            f'{log_call}\ncase "$*" in\n  --signal*) ;;\n  --state=PENDING*) sed -i /PENDING/d {jobs} ;;\n'
            f"  *) : > {jobs} ;;\nesac",
        )

    def jobs(self, *lines: str, then: tuple[str, ...] = ()) -> None:
        """Let squeue print these lines, and after each question the next of `then`."""
        (self.folder / "jobs").write_text("".join(f"{line}\n" for line in lines))
        for number, line in enumerate(then):
            (self.folder / f"next.{number}").write_text(f"{line}\n")

    def ended(self, state: str) -> None:
        """Let the controller remember how the job ended."""
        (self.folder / "ended").write_text(f"JobId=7 JobName=trial JobState={state} ExitCode=0:0\n")

    def calls(self, command: str = "") -> list[str]:
        """Return the calls of a command, or all."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(command)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put a Slurm of shell scripts first in PATH."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.environment()["PATH"])
    return fake


def in_slurm(run: RunFolder, attempt: int = 1, at: float = -60.0) -> None:
    """Append the submission of Slurm job 7, with the folder that goes with it."""
    run.submitit_dir(attempt).mkdir(parents=True)
    event(run, "submit", attempt, at, executor="slurm", job_id="7", world_size=2, process=None)


def printed(text: str) -> dict:
    """Read what --json printed."""
    return json.loads(text)
