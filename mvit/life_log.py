"""What one life of a run puts on the ledger: when it began to be productive, and where its time went."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from mvit.checkpoint_save import Outcome
from mvit.life import Life

_REST_S = 10.0  # between two records of progress; a lost node's work is known this well
_REST_SHARE = 0.01  # of a long life, so that a month of training is a thousand lines and not 260,000


class LifeLog:
    """Measures a life's parts and records them, where `active` (rank 0); costs nothing between log points."""

    def __init__(self, life: Life, *, active: bool) -> None:
        self._life, self._active = life, active
        self._created = time.perf_counter()
        self._began: float | None = None
        self._told = float("-inf")
        self._first_step = 0
        self._stall_s = self._evaluate_s = self._data_wait_s = 0.0

    def restored(self, step: int, seconds: float) -> None:
        """Record that the state of `step` is loaded (0: there was none), of a life's first phase."""
        if self._began is None:
            self._record("restored", {"step": step, "seconds": round(seconds, 3)})

    def begin(self) -> None:
        """Start the clock: training begins; an evaluation before it was no part of it."""
        if self._began is None:
            self._began = time.perf_counter() - self._stall_s - self._evaluate_s

    def stepped(self, step: int) -> None:
        """Record the first finished step; later ones only when it is time for a record."""
        if not self._first_step:
            self._first_step = step
            self._record("first_step", {"step": step})

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._data_wait_s += seconds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time inside as evaluation."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._evaluate_s += time.perf_counter() - since

    @contextmanager
    def building(self) -> Iterator[None]:
        """Count the time inside with the saves if training has begun: the model of the next phase takes over a save."""
        with self.saving() if self._began is not None else nullcontext():
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time inside as waiting for a save."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._stall_s += time.perf_counter() - since

    def progress(self, step: int, *, now: bool = False) -> None:
        """Record how far the life is and what its time went into, unless that was done a moment ago."""
        if self._began is None:
            return
        moment = time.perf_counter()
        if not now and moment - self._told < max(_REST_S, _REST_SHARE * (moment - self._began)):
            return
        self._told = moment
        training = self._told - self._began - self._stall_s - self._evaluate_s
        parts = {
            "train_s": training,
            "stall_s": self._stall_s,
            "evaluate_s": self._evaluate_s,
            "data_wait_s": self._data_wait_s,
        }
        self._record("progress", {"step": step} | {key: round(value, 3) for key, value in parts.items()})

    def saved(self, outcome: Outcome) -> None:
        """Record a published checkpoint."""
        facts = {"seconds": round(outcome.seconds, 3), "stall_s": round(outcome.stalled_s, 3)}
        self._record("saved", {"step": outcome.step, **facts, "bytes": outcome.num_bytes})

    def _record(self, event: str, facts: Mapping[str, object]) -> None:
        if self._active:
            self._life.record(event, facts)
