"""What the ranks of a run wrote: their logs, the stacks of a hang, the batch script's output; also as they grow."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.judgement import judge_now_and_when_again
from launcher.run_folder import RunFolder, RunFolderError
from launcher.status import run_state

Kind = Literal["log", "stacks", "submitit"]
_SUFFIX = {"log": ".log", "stacks": ".stacks.txt"}
_BLOCK = 1 << 16
_POLL_S = 0.3
_FIRST_LINES = 20  # of each file, when following begins


@dataclass(frozen=True)
class Wanted:
    """Which files of an attempt to show."""

    kind: Kind = "log"
    rank: int | None = 0  # None: all ranks


@dataclass(frozen=True)
class LogFile:
    """One file that a rank wrote."""

    rank: int
    path: Path


def attempts_with(run: RunFolder, wanted: Wanted, after: int = 0) -> list[int]:
    """Return the attempts, those after one, that have such files of the rank wanted."""
    folders = [path for top in (run.attempt_dir(1), run.submitit_dir(1)) for path in top.parent.glob("attempt_*")]
    numbers = {path.name.removeprefix("attempt_") for path in folders}
    known = sorted(int(number) for number in numbers if number.isdigit())
    return [attempt for attempt in known if attempt > after and log_files(run, attempt, wanted)]


def log_files(run: RunFolder, attempt: int, wanted: Wanted) -> list[LogFile]:
    """Return the files of an attempt that are there now, in rank order."""
    if wanted.kind == "submitit":  # requeued lives write on in the files of their submission
        folder = run.submitit_dir(run.submission_of(attempt))
        found = [LogFile(int(path.stem.split("_")[-2]), path) for path in sorted(folder.glob("*_[0-9]*_log.*"))]
        found += [LogFile(0, path) for path in folder.glob("controller.log") if path.stat().st_size]
    else:
        suffix = _SUFFIX[wanted.kind]
        paths = sorted(run.attempt_dir(attempt).glob(f"rank_*{suffix}"))
        names = [(path.name.removeprefix("rank_").removesuffix(suffix), path) for path in paths]
        found = [LogFile(int(name), path) for name, path in names if name.isdigit()]
    return [file for file in found if wanted.rank in (None, file.rank)]


def choose_attempt(run: RunFolder, wanted: Wanted, attempt: int | None) -> int:
    """Return the attempt asked for, or the newest that has such files.

    Raises RunFolderError naming what there is instead.
    """
    run.identity()  # says so if this is no run
    found = attempts_with(run, wanted)
    if attempt is None and found:
        return found[-1]
    if attempt in found:
        assert attempt is not None
        return attempt
    raise RunFolderError(_what_there_is(run, wanted, attempt, found))


def show_logs(run: RunFolder, wanted: Wanted, attempt: int, num_lines: int | None) -> Iterator[str]:
    """Yield the lines of an attempt's files, the last `num_lines` of each; None: all."""
    files = log_files(run, attempt, wanted)
    for file in files:
        lines = _lines(file.path) if num_lines is None else iter(last_lines(file.path, num_lines))
        if wanted.kind != "log" and len(files) > 1:
            yield f"==> {file.path} <=="
        for line in lines:
            yield _prefix(file, files, wanted) + line


def why_empty(run: RunFolder, wanted: Wanted, attempt: int) -> str | None:
    """Say what a run does instead of writing, None if there is something to show."""
    files = log_files(run, attempt, wanted)
    if any(file.path.stat().st_size for file in files):
        return None
    what = str(files[0].path) if len(files) == 1 else f"each of the {len(files)} files of attempt {attempt}"
    return f"{what} is empty so far: the run is {_what_it_does(run)}"


def follow_logs(
    run: RunFolder,
    wanted: Wanted,
    attempt: int | None,
    num_lines: int | None,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Iterator[str]:
    """Yield lines as they are written, of this life and of those after it, until the run ends.

    What stands before the lines of each life, and why nothing comes, goes to `tell`.
    """
    run.identity()
    found = attempts_with(run, wanted)
    if attempt is not None and attempt not in found:
        raise RunFolderError(_what_there_is(run, wanted, attempt, found))
    life = attempt or (found[-1] if found else 0)
    tails: dict[Path, _Tail] = {}
    keep = _FIRST_LINES if num_lines is None else num_lines
    (now, again_at), told = judge_now_and_when_again(run), None
    while True:
        if time.monotonic() >= again_at:
            now, again_at = judge_now_and_when_again(run)
        over = now.at_rest  # looked up before the files are read: what was written before the end is then all shown
        following = attempts_with(run, wanted, after=life)
        files = log_files(run, life, wanted) if life else []
        for file in files:
            tail = tails.setdefault(file.path, _Tail(file.path, keep))
            for line in tail.read(to_the_end=over or bool(following)):
                yield _prefix(file, files, wanted) + line
                told = (now.state, now.attempt)  # it speaks for itself
        if following:
            life, keep = following[0], sys.maxsize
            tell(f"--- attempt {life}")
            continue
        if over:
            tell(f"--- the run is {now.state}" + (f" ({now.detail})" if now.detail else ""))
            return
        if told != (now.state, now.attempt):
            told = (now.state, now.attempt)
            tell(f"--- {_what_it_does(run)}")
        time.sleep(_POLL_S)


class _Tail:
    """Reads the lines that were added to a file since the last look."""

    def __init__(self, path: Path, num_lines: int) -> None:
        self._path, self._rest = path, b""
        self._offset: int | None = None
        self._num_lines = num_lines

    def read(self, to_the_end: bool) -> list[str]:
        """Return whole new lines; with `to_the_end` an unfinished one too."""
        with self._path.open("rb") as file:
            if self._offset is None:
                self._offset = 0 if self._num_lines == sys.maxsize else _begin_of_last(self._path, self._num_lines)
            file.seek(self._offset)
            block = file.read()
        self._offset += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        if to_the_end and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [line.decode(errors="replace") for line in lines]


def last_lines(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of a file without reading the rest of it."""
    with path.open("rb") as file:
        file.seek(_begin_of_last(path, num_lines))
        text = file.read().decode(errors="replace")
    return text.removesuffix("\n").split("\n") if text else []


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as a person writes them: `0-3, 7`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, bounds)) for bounds in ranges)


def _begin_of_last(path: Path, num_lines: int) -> int:
    """Return where the last lines of a file begin."""
    with path.open("rb") as file:
        begin = size = file.seek(0, 2)
        tail = b""
        while begin > 0 and tail.count(b"\n") <= num_lines:
            begin = max(0, begin - _BLOCK)
            file.seek(begin)
            tail = file.read(size - begin)
    ends = tail.endswith(b"\n")
    lines = tail.removesuffix(b"\n").split(b"\n") if tail else []
    if num_lines == 0 or size == 0:
        return size
    return max(0, size - sum(len(line) + 1 for line in lines[-num_lines:]) + (not ends))


def _lines(path: Path) -> Iterator[str]:
    with path.open(errors="replace", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _prefix(file: LogFile, files: Sequence[LogFile], wanted: Wanted) -> str:
    if wanted.rank is not None or wanted.kind == "submitit":
        return ""
    width = len(str(max(file.rank for file in files)))
    return f"[{file.rank:>{width}}] " if wanted.kind == "log" else ""


def _what_there_is(run: RunFolder, wanted: Wanted, attempt: int | None, found: Sequence[int]) -> str:
    name = {"log": "log", "stacks": "stacks", "submitit": "output of the batch script"}[wanted.kind]
    of_rank = "" if wanted.rank is None else f" of rank {wanted.rank}"
    every = Wanted(wanted.kind, None)
    at = attempt if attempt is not None else next(iter(reversed(attempts_with(run, every))), None)
    ranks = [] if at is None else [file.rank for file in log_files(run, at, every)]
    if ranks and wanted.rank is not None:
        return f"attempt {at} of {run.path} has no {name}{of_rank}: there are those of rank(s) {number_ranges(ranks)}."
    if found:
        return f"attempt {attempt} of {run.path} has no {name}{of_rank}: attempt(s) {number_ranges(found)} have."
    if wanted.kind == "stacks":
        return (
            f"{run.path} has no stacks: they are dumped when a rank hangs, and none was found hanging. "
            f"What ended it: mvit why {run.path}"
        )
    return f"{run.path} has no {name} yet: it is {_what_it_does(run)}. See also: mvit why {run.path}"


def _what_it_does(run: RunFolder) -> str:
    state = run_state(run.path)
    return ": ".join([state.state, *([state.detail] if state.detail else [])]) + (
        f"; {state.activity}" if state.activity else ""
    )
