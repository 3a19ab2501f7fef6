"""Faults of a run's own processes at exact places, told by MVIT_FAULTS: a fire drill for what a run must survive.

`MVIT_FAULTS="kill@12:1,full-disk@20"` in a cluster file's `env:` kills rank 1 at the beginning of step 12 and lets the
first save at or after step 20 fail, once in the whole run: what has happened is remembered in RUN_DIR/faults, so that
the life after it does not die of the same fault again.
"""

import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "MVIT_FAULTS"
SLOW_S = 5.0
KINDS = {
    "kill": "SIGKILL",
    "raise": "an exception",
    "hang": "sleeps for ever",
    "spin": "computes for ever in Python",
    "freeze": "hangs in a C function that holds Python's lock",
    "stop": "SIGUSR2, as Slurm sends before a time limit; without a rank: every rank",
    "term": "SIGTERM; without a rank: every rank",
    "exit": "leaves with exit code 3 and no word",
    "segv": "a segmentation fault",
    "slow": f"one step takes {SLOW_S:g} s longer, which must trouble nobody",
    "full-disk": "the first save at or after the step finds no space left; without a rank: on every rank",
    "kill-in-save": "SIGKILL while the first save at or after the step writes",
}
"""What the rank does, by name."""
_EVERY_RANK = ("stop", "term", "full-disk")  # without a rank; the others happen on rank 0
_IN_SAVE = ("full-disk", "kill-in-save")
_SIGNALS = {
    "kill": signal.SIGKILL,
    "kill-in-save": signal.SIGKILL,
    "stop": signal.SIGUSR2,
    "term": signal.SIGTERM,
}
_FORM = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d+)(:(?P<rank>\d+))?(x(?P<times>\d+))?")


class FaultError(ValueError):
    """MVIT_FAULTS cannot be read; the message holds the grammar."""


class InjectedFault(RuntimeError):
    """The exception that `raise@STEP` asks for."""


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, at which step, on which rank (None: on every rank), in how many lives."""

    kind: str
    step: int
    rank: int | None
    times: int = 1

    def __str__(self) -> str:
        """Return the fault as it is written in MVIT_FAULTS, without the number of times."""
        return f"{self.kind}@{self.step}" + ("" if self.rank is None else f":{self.rank}")


def parse(text: str, world_size: int | None = None) -> tuple[Fault, ...]:
    """Read `kind@step[:rank][xTIMES]`, comma-separated; with `world_size`, the ranks must exist.

    Raises FaultError with the grammar.
    """
    faults: dict[str, Fault] = {}
    for word in (part.strip() for part in text.split(",")):
        if not word:
            continue
        fault = _parse_one(word)
        if world_size is not None and fault.rank is not None and fault.rank >= world_size:
            raise FaultError(_explain(word, f"the job has the ranks 0 to {world_size - 1}"))
        if str(fault) in faults:
            raise FaultError(_explain(word, f"is there twice; for a fault in two lives write {fault}x2"))
        faults[str(fault)] = fault
    return tuple(faults.values())


def _parse_one(word: str) -> Fault:
    found = _FORM.fullmatch(word)
    if found is None:
        raise FaultError(_explain(word, "is not of the form kind@step[:rank][xTIMES]"))
    kind, step, times = found["kind"], int(found["step"]), int(found["times"] or 1)
    if kind not in KINDS:
        raise FaultError(_explain(word, f"there is no kind {kind!r}"))
    if step < 1:
        raise FaultError(_explain(word, "steps are counted from 1"))
    if times < 1:
        raise FaultError(_explain(word, "x0 would never happen; leave it out"))
    rank = int(found["rank"]) if found["rank"] else None if kind in _EVERY_RANK else 0
    return Fault(kind, step, rank, times)


def _explain(word: str, problem: str) -> str:
    kinds = "\n".join(f"  {kind:<13} {meaning}" for kind, meaning in KINDS.items())
    return (
        f"{VARIABLE}: {word!r}: {problem}. Write kind@step[:rank][xTIMES], comma-separated: kill@12:1 kills rank 1 "
        "at the beginning of step 12, raise@12x3 raises on rank 0 there in three lives of the run. A kind is one of\n"
        f"{kinds}"
    )


class FaultObserver:
    """A trainer's observer that lets this rank's faults happen, each as often as asked over all lives of the run."""

    def __init__(self, faults: Sequence[Fault], run_dir: Path, rank: int) -> None:
        mine = [replace(fault, rank=rank) for fault in faults if fault.rank in (None, rank)]
        self._at_step = [fault for fault in mine if fault.kind not in _IN_SAVE]
        self._in_save = [fault for fault in mine if fault.kind in _IN_SAVE]
        self._folder = run_dir / "faults"
        self._saving = threading.local()  # a save writes in a thread of its own

    def started(self, step: int, engine: object) -> None:
        """Do nothing: a fault belongs to a step."""

    def read(self, step: int, accumulation: int, batch: object) -> None:
        """Let happen what is due at the beginning of `step`."""
        for fault in self._at_step if accumulation == 0 else ():
            if fault.step == step and self._remember(fault, f"at step {step}"):
                _act(fault)

    def updated(self, step: int, losses: Sequence[object], grad_norm: object, lr: float, engine: object) -> None:
        """Do nothing."""

    def install_save_hooks(self) -> None:
        """Reach into the saves of this process; changes nothing unless a fault of a save is asked for."""
        if not self._in_save:
            return
        import mvit.checkpoint_files
        import mvit.checkpoint_save

        inner: Callable[..., Any] = mvit.checkpoint_save.write_shard

        def write_shard(path: Path, *rest: Any) -> Any:
            self._saving.step = int(path.parent.name.split(".")[1].removeprefix("step_"))  # .step_00000012.TOKEN.tmp
            return inner(path, *rest)

        mvit.checkpoint_save.write_shard = write_shard
        mvit.checkpoint_files.at_point = self._at_point

    def _at_point(self, name: str) -> None:
        if name not in ("piece written", "shard synced"):  # the second for a shard that is one piece
            return
        for fault in self._in_save:
            if fault.step <= self._saving.step and self._remember(fault, f"in the save of step {self._saving.step}"):
                _act(fault)

    def _remember(self, fault: Fault, where: str) -> bool:
        """Say whether a fault is still to happen; if so, note durably that it has, before it does."""
        for number in range(1, fault.times + 1):
            path = self._folder / f"{fault}.{number}"
            if path.exists():
                continue
            self._folder.mkdir(exist_ok=True)
            with path.open("x") as file:
                file.write(json.dumps({"time": time.time(), "pid": os.getpid(), "where": where}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _fsync_dir(self._folder)
            asked = f"{number} of {fault.times}, asked for by {VARIABLE}"
            print(f"fault injection: {fault} {where} ({asked})", file=sys.stderr, flush=True)
            return True
        return False


def observer_from_environment(run_dir: Path, rank: int) -> FaultObserver | None:
    """Return the observer for this rank's faults with its hooks in place, None without MVIT_FAULTS.

    Raises FaultError if the variable cannot be read.
    """
    faults = parse(os.environ.get(VARIABLE, ""))
    if not faults:
        return None
    observer = FaultObserver(faults, run_dir, rank)
    observer.install_save_hooks()
    return observer


def _act(fault: Fault) -> None:
    if fault.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.kind])
    elif fault.kind == "raise":
        raise InjectedFault(f"the fault {fault} that {VARIABLE} asks for")  # the same words in every life
    elif fault.kind == "full-disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.kind == "exit":
        os._exit(3)
    elif fault.kind == "segv":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of a training process is huge
        ctypes.string_at(0)
    elif fault.kind == "slow":
        time.sleep(SLOW_S)
    else:
        _hang(fault.kind)


def _hang(kind: str) -> NoReturn:
    """Never return, whatever signal comes."""
    while True:
        if kind == "freeze":  # PyDLL keeps Python's lock; a signal cuts this sleep short
            ctypes.PyDLL(None).sleep(3600)
        elif kind == "hang":
            time.sleep(3600)


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
