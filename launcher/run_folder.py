"""The run folder: where everything about one run lies, whose it is, and its append-only record of attempts."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RunFolderError(ValueError):
    """A run folder that cannot be used as asked; the message says what was found and the ways out."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run.

    `config.yaml` resolved recipe · `run.json` identity · `code/` snapshot · `logs/attempt_NNN/` one log and one
    record per rank · `submitit/attempt_NNN/` the executor's files · `checkpoints/` · `metrics.jsonl` ·
    `attempts.jsonl` one line per event: submit, start, end.
    """

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def code_dir(self) -> Path:
        return self.path / "code"

    @property
    def attempts_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def attempt_dir(self, attempt: int) -> Path:
        """Return the folder of one attempt's rank logs and rank records."""
        return self.path / "logs" / f"attempt_{attempt:03d}"

    def submitit_dir(self, attempt: int) -> Path:
        """Return submitit's folder; one per submission, because local job ids are pids and come again."""
        return self.path / "submitit" / f"attempt_{attempt:03d}"

    def stop_file(self, attempt: int) -> Path:
        """Return the mark of a stop that a person asked for: not to be requeued, and no starting rank misses it.

        It lies with the submission that the attempt belongs to: a stop asked of a life that was requeued at that moment
        holds for the lives after it, until somebody submits the run again. Costs one listing of a folder that has one
        entry a submission: every rank of every life asks.
        """
        return self.attempt_dir(self.submission_of(attempt)) / "stop_requested"

    def submission_of(self, attempt: int) -> int:
        """Return the attempt that was submitted by a person and, requeued or not, led to this one.

        Told by submitit's folders, which are there before the job is: no life can start unseen.
        """
        folder = self.submitit_dir(attempt).parent
        names = os.listdir(folder) if folder.is_dir() else []
        begun = [int(name.removeprefix("attempt_")) for name in names if name.removeprefix("attempt_").isdigit()]
        return max((life for life in begun if life <= attempt), default=attempt)

    def end_file(self, attempt: int) -> Path:
        """Return the mark that an attempt's end is recorded: of several processes that see it, one writes."""
        return self.attempt_dir(attempt) / "ended"

    def identity(self) -> dict[str, Any]:
        """Read run.json.

        Raises RunFolderError when the folder is not a run.
        """
        try:
            return json.loads(self.run_file.read_text())
        except ValueError:
            raise RunFolderError(f"{self.run_file} is damaged: it is no JSON. The run cannot be told apart.") from None
        except (FileNotFoundError, NotADirectoryError):
            raise RunFolderError(
                f"{self.path} is not a run folder: it has no run.json. Give the folder that `mvit submit` or "
                "`mvit train` printed (output_dir/name of the recipe)."
            ) from None

    def events(self) -> list[dict[str, Any]]:
        """Read the attempts' events in the order they were written."""
        return [event for event in read_json_lines(self.attempts_file) if {"event", "attempt", "time"} <= event.keys()]

    def append_event(self, event: str, attempt: int, **facts: object) -> None:
        """Append one event of an attempt, stamped with the time (seconds since the epoch)."""
        append_json_line(self.attempts_file, {"event": event, "attempt": attempt, "time": time.time(), **facts})

    def last_attempt(self) -> int:
        """Return the highest attempt number used so far, 0 before the first."""
        return max((event["attempt"] for event in self.events()), default=0)

    def checkpoint_step(self) -> int:
        """Return the step of the checkpoint published last, 0 when there is none.

        Not always the highest: a run that fell back from a damaged checkpoint publishes lower ones after it.
        """
        folder = self.path / "checkpoints"
        names = [path.name for path in folder.glob("step_*") if path.is_dir()]
        steps = [int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit()]
        published = [record["step"] for record in read_json_lines(folder / "published.jsonl")]
        return next((step for step in reversed(published) if step in steps), max(steps, default=0))

    def rank_records(self, attempt: int) -> list[dict[str, Any]]:
        """Read the records of an attempt's ranks, in rank order."""
        return read_records(self.attempt_dir(attempt), "rank_[0-9]*[0-9].json")

    def rank_errors(self, attempt: int) -> list[dict[str, Any]]:
        """Read the errors that ranks of an attempt left behind, in rank order."""
        return read_records(self.attempt_dir(attempt), "rank_*.error.json")


def rank_file(attempt_dir: Path, rank: int, suffix: str) -> Path:
    """Return `rank_RRRR<suffix>`: `.log` output, `.json` record, `.error.json` the exception that ended it."""
    return attempt_dir / f"rank_{rank:04d}{suffix}"


def claim(run: RunFolder, identity: Mapping[str, object]) -> None:
    """Make the folder this run's by writing run.json, which must not exist yet.

    Raises RunFolderError when the folder already holds something: another run, or files that are not ours.
    """
    refuse_foreign(run)
    run.path.mkdir(parents=True, exist_ok=True)
    temporary = run.path / f".run.json.{os.getpid()}"
    temporary.write_text(json.dumps(identity, indent=2) + "\n")
    try:
        os.link(temporary, run.run_file)  # fails if it exists: of two submissions at once, one wins
    except FileExistsError:
        raise _occupied(run) from None
    finally:
        temporary.unlink()


def refuse_foreign(run: RunFolder) -> None:
    """Raise RunFolderError unless the folder is absent or empty."""
    if run.path.is_dir() and not any(run.path.iterdir()):
        return
    if run.path.exists():
        raise _occupied(run)


def _occupied(run: RunFolder) -> RunFolderError:
    if run.run_file.exists():
        found = run.identity()
        return RunFolderError(
            f"{run.path} belongs to the run {found.get('name')!r} (id {found.get('id')}, created "
            f"{found.get('created')}, last checkpoint at step {run.checkpoint_step()}). To continue that run: "
            f"mvit resume {run.path}, or `mvit train … --resume`. To start another: give it another name "
            "(name=…) or output_dir."
        )
    if not run.path.is_dir():
        return RunFolderError(f"{run.path} is a file, so it cannot be the run folder: choose another name=….")
    found = sorted(path.name for path in run.path.iterdir())
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return RunFolderError(
        f"{run.path} is not empty and not a run folder (it holds {shown}). Nothing was touched: choose "
        "another name=… or output_dir=…, or empty the folder."
    )


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(record) + "\n")
    temporary.replace(path)


def write_first(path: Path, record: Mapping[str, object]) -> bool:
    """Write a JSON file unless it exists already; of several writers one succeeds, and no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(record) + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Read the JSON files of a folder that match a glob pattern, by name.

    A file that vanished meanwhile, or that a lost node left empty, is passed over.
    """
    found = (read_record(path) for path in sorted(folder.glob(pattern)))
    return [record for record in found if record is not None]


def read_record(path: Path) -> dict[str, Any] | None:
    """Read one JSON file; None if it is not there or empty."""
    try:
        return parse_json_line(path.read_bytes())
    except FileNotFoundError:
        return None


def append_json_line(path: Path, record: Mapping[str, object]) -> None:
    """Append one line in a single write, so that lines of several processes do not mix."""
    line = (json.dumps(record) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a writer was killed within its line
            line = b"\n" + line
        if (written := os.write(descriptor, line)) < len(line):
            raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written to {path}")
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file, none if it does not exist.

    A line that a killed writer left unfinished is passed over: its event did not happen.
    """
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        record = parse_json_line(line)
        if record is not None:
            yield record


def parse_json_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, None for an empty or unfinished one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
