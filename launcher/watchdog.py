"""When a rank counts as hung: pure rules over its heartbeats."""

from collections import deque
from dataclasses import dataclass, field

from launcher.heartbeat import Beat

LEAST_LIMIT_S = 120.0
RESERVE_S = 15.0  # of the limit: for dumping the stacks of all ranks, ending them and requeueing
_STEPPING = ("data", "compute", "log", "evaluate")
_NUM_KEPT = 1000
_SHORTEST_LIMIT_S = 60.0
_LONGEST_GAP_S = 1.0


@dataclass(frozen=True)
class Stall:
    """A rank that has not moved for longer than it may."""

    step: int
    phase: str
    age_s: float
    limit_s: float


class AwakeClock:
    """Seconds that its reader has been awake: a job that Slurm suspends, or a machine that sleeps, is no silent rank.

    To be read several times a second, with any clock that does not jump; a longer gap means that the reader, too, did
    not run.
    """

    def __init__(self, now: float) -> None:
        self._last, self._awake_s = now, 0.0

    def read(self, now: float) -> float:
        """Return the seconds awake so far."""
        self._awake_s += min(now - self._last, _LONGEST_GAP_S)
        self._last = now
        return self._awake_s


@dataclass
class Watchdog:
    """Decides from one rank's beats whether it hangs; its clock is AwakeClock, from the start of the rank.

    `hang_timeout_s` limits the time between two beats while stepping; None derives it as max(2 x p99 of the step time,
    120 s), less `reserve_s` in which the job is ended. Before the first finished step, in the first evaluation, in
    saves and at the end `start_timeout_s` holds: compiling, restoring and writing take as long as they take.
    """

    hang_timeout_s: float | None
    start_timeout_s: float
    reserve_s: float = RESERVE_S
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _beat: Beat | None = None
    _since: float = 0.0  # when that beat was seen first
    _last: tuple[int, float] | None = None  # the step seen last, and when it began
    _is_evaluating: bool = False
    _has_evaluated: bool = False

    def look(self, beat: Beat | None, now: float) -> Stall | None:
        """Return the stall of a rank whose newest beat is `beat`, None while it may still be working."""
        if beat is not None and beat != self._beat:
            self._beat, self._since = beat, now
            self._learn(beat, now)
        age_s = now - self._since
        limit_s = self.limit_s if self._is_stepping else max(self.start_timeout_s, self.limit_s)
        if age_s <= limit_s:
            return None
        step, phase = (0, "start") if self._beat is None else (self._beat.step, self._beat.phase)
        return Stall(step, phase, age_s, limit_s)

    @property
    def limit_s(self) -> float:
        """The longest silence allowed while stepping."""
        if self.hang_timeout_s is not None:
            return self.hang_timeout_s
        limit_s = max(2 * self.p99_s, LEAST_LIMIT_S) - self.reserve_s
        return max(limit_s, 1.5 * self.p99_s, _SHORTEST_LIMIT_S)  # where ending thousands of ranks takes longer

    @property
    def p99_s(self) -> float:
        """The step time that one step in a hundred exceeded, 0 before the first."""
        ordered = sorted(self._steps)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0

    @property
    def _is_stepping(self) -> bool:
        if self._beat is None or self._beat.phase not in _STEPPING or not self._steps:
            return False
        return self._has_evaluated or self._beat.phase != "evaluate"

    def _learn(self, beat: Beat, now: float) -> None:
        if beat.phase not in ("data", "compute"):
            if beat.phase in ("evaluate", "save"):
                self._last = None  # the step after it began earlier
                self._has_evaluated |= self._is_evaluating and beat.phase == "save"
                self._is_evaluating = beat.phase == "evaluate"
            return
        self._has_evaluated |= self._is_evaluating
        if self._last is not None and beat.step > self._last[0]:
            step, when = self._last
            self._steps.extend([(now - when) / (beat.step - step)] * min(beat.step - step, _NUM_KEPT))
        if self._last is None or beat.step > self._last[0]:
            self._last = (beat.step, now)
