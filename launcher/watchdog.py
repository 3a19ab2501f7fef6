"""When a rank counts as hung: pure rules over its heartbeats."""

from collections import deque
from dataclasses import dataclass, field

from launcher.heartbeat import Beat

LEAST_LIMIT_S = 120.0
RESERVE_S = 15.0  # of the limit: for dumping the stacks of all ranks, ending them and requeueing
_STEPPING = ("data", "compute", "log", "evaluate")
_NUM_KEPT = 1000


@dataclass(frozen=True)
class Stall:
    """A rank that has not moved for longer than it may."""

    step: int
    phase: str
    age_s: float
    limit_s: float


@dataclass
class Watchdog:
    """Decides from one rank's beats whether it hangs.

    `hang_timeout_s` limits the time between two beats while stepping; None derives it as max(2 x p99 of the step time,
    120 s), less 15 s in which the job is ended. Before the first finished step, in saves and at the end
    `start_timeout_s` holds: compiling, restoring and writing take as long as they take.
    """

    hang_timeout_s: float | None
    start_timeout_s: float
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _last: tuple[int, float] | None = None  # the step seen last, and when it began

    def look(self, beat: Beat | None, started: float, now: float) -> Stall | None:
        """Return the stall of a rank that was started at `started`, None while it may still be working."""
        if beat is None:
            return self._judge(0, "start", now - started, self.start_timeout_s)
        self._learn(beat)
        stepping = beat.phase in _STEPPING and bool(self._steps)
        return self._judge(
            beat.step,
            beat.phase,
            now - beat.time,
            self.limit_s if stepping else max(self.start_timeout_s, self.limit_s),
        )

    @property
    def limit_s(self) -> float:
        """The longest silence allowed while stepping."""
        if self.hang_timeout_s is not None:
            return self.hang_timeout_s
        return max(2 * self.p99_s, LEAST_LIMIT_S) - RESERVE_S

    @property
    def p99_s(self) -> float:
        """The step time that one step in a hundred exceeded, 0 before the first."""
        ordered = sorted(self._steps)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0

    def _learn(self, beat: Beat) -> None:
        if beat.phase not in ("data", "compute"):
            if beat.phase in ("evaluate", "save"):
                self._last = None  # the step after it began earlier
            return
        if self._last is not None and beat.step > self._last[0]:
            step, when = self._last
            self._steps.extend([(beat.time - when) / (beat.step - step)] * min(beat.step - step, _NUM_KEPT))
        if self._last is None or beat.step > self._last[0]:
            self._last = (beat.step, beat.time)

    @staticmethod
    def _judge(step: int, phase: str, age_s: float, limit_s: float) -> Stall | None:
        return Stall(step, phase, age_s, limit_s) if age_s > limit_s else None
