"""Where the time of a step goes: its parts one after the other, on the device's own clock, without waiting for it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PARTS: tuple[str, ...] = ("data", "transfer", "forward", "backward", "optimizer", "communication", "other")
"""data: waiting for the next batch; transfer: to the device; optimizer: clipping and update; communication: inside
collectives, waiting for slower ranks included (on CPUs; on GPUs it is part of what it is hidden in or delays); other:
all else."""


class StepTimer:
    """Splits the time between two reads into parts; evaluation and saving belong to none of them.

    `mark(part)` says that all since the last mark was `part`. On CUDA a mark is an event in the current stream, so the
    parts are the device's: waiting for data counts as far as the device stood idle. Nothing here waits for the device
    but `read`, which needs every event to have happened.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._communicated = 0.0  # inside collectives since the last mark
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: list[tuple[str, Any, Any]] = []  # part, event at its begin, event at its end
        self._steps = 0
        self._last: Any = self._now()

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """Say that the time since the last mark went into `part`, but for what was inside collectives."""
        now = self._now()
        if self._events:
            self._pending.append((part, self._last, now))
        else:
            inside = min(self._communicated, now - self._last)
            self._seconds[part] += now - self._last - inside
            self._seconds["communication"] += inside
        self._last, self._communicated = now, 0.0

    def communicated(self, seconds: float) -> None:
        """Add time that this process spent inside a collective since the last mark."""
        if not self._events:
            self._communicated += seconds

    def step(self) -> None:
        """Count one finished step."""
        self._steps += 1

    def skip(self) -> None:
        """Leave out the time since the last mark: an evaluation or a save."""
        self._last, self._communicated = self._now(), 0.0

    def read(self) -> tuple[int, dict[str, float]]:
        """Return the steps since the last read and the seconds of each part, and start anew; waits for the device."""
        if self._pending:
            self._pending[-1][2].synchronize()
            for part, begin, end in self._pending:
                self._seconds[part] += begin.elapsed_time(end) / 1000
            self._pending.clear()
        steps, seconds = self._steps, self._seconds
        self._steps, self._seconds = 0, dict.fromkeys(PARTS, 0.0)
        return steps, seconds


def rates(steps: int, seconds: dict[str, float], samples_per_step: int) -> dict[str, float]:
    """Return speed and the seconds of each part of a step, as a record of the run holds them."""
    total, steps = max(sum(seconds.values()), 1e-9), max(steps, 1)
    return {
        "samples_per_s": steps * samples_per_step / total,
        "step_seconds": total / steps,
        "data_wait": seconds["data"] / total,
        **{f"{part}_seconds": value / steps for part, value in seconds.items()},
    }


def own_seconds(seconds: dict[str, float]) -> float:
    """Return what a rank needed by itself: all but collectives, in which it also waits for slower ranks."""
    return sum(value for part, value in seconds.items() if part != "communication")


def slowest(own: Sequence[float]) -> dict[str, float]:
    """Return the rank that needed most by itself, and by which share that is above the median of all ranks."""
    ordered = sorted(own)
    median = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
    return {"slowest_rank": float(own.index(max(own))), "slowest_excess": max(own) / max(median, 1e-9) - 1}


_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
)


def time_collectives(backend: Any, spent: Callable[[float], None]) -> Callable[[], None]:
    """Tell `spent` the seconds of each collective of DeepSpeed's backend object, waiting for its end included.

    Returns what takes the timing away again.
    """
    names = [name for name in _COLLECTIVES if hasattr(backend, name)]
    for name in names:
        setattr(backend, name, _timed(getattr(backend, name), spent))

    def undo() -> None:
        for name in names:
            delattr(backend, name)  # the class's own method is visible again

    return undo


def _timed(call: Callable[..., Any], spent: Callable[[float], None]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            work = call(*args, **kwargs)
        finally:
            spent(time.perf_counter() - began)
        return work if not hasattr(work, "wait") else _TimedWork(work, spent)

    return timed


class _TimedWork:
    """A collective under way whose `wait` is timed."""

    def __init__(self, work: Any, spent: Callable[[float], None]) -> None:
        self._work, self._spent = work, spent

    def wait(self, *args: Any) -> Any:
        """Wait for its end."""
        began = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._spent(time.perf_counter() - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
