"""How often a run saves: at multiples of `train.save_every`, or as often as measured costs and failures make best.

Saving often costs stalls, saving seldom costs steps that a failure makes the run do again. With a save that costs
delta seconds and failures M seconds apart, the sum is least at an interval of sqrt(2 delta M): J. W. Young, "A first
order approximation to the optimum checkpoint interval", CACM 17(9), 1974. J. T. Daly, "A higher order estimate of the
optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22(3), 2006, corrects it for delta
that is not small against M. Close to the optimum the sum is flat: an interval 20 % off costs 2 % more than the least.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from mvit.ledger import duration

ENOUGH_FAILURES = 3
"""With fewer, the run's own mean time to failure says less than what others published."""
CHANGE = 0.2
"""The interval stays until a new one differs by more than this: closer to the optimum there is nothing to gain."""
PUBLISHES = 2
"""An interval is at least so many times from begin to publish: saves that wait for each other stall training."""
CAP_S = 30 * 60.0
"""Failures are not all: a preemption without notice, which no failure rate foretells, loses half an interval on
average and a whole one at worst. A stall of seconds in half an hour costs less than 0.1 %."""
CAP_OVERHEAD = 0.01
"""The cap gives way where saves that often would cost more than this share of the time."""
STALL_S_PER_GB = 0.25
"""Copy to host memory, measured on CPUs (docs/benchmarks.md); used until the run has measured its own."""
PUBLISH_S_PER_GB = 3.0
"""From begin to publish, measured there too; a save that training waits for stalls it as long."""
FIRST_SAVE_S = 5 * 60.0
"""While no life has saved, the first save comes at the first log point or after this long, whichever is first: a run
that dies soon has a checkpoint to go on from, and the interval follows from a measured save instead of a guess."""
_REMEMBERED = 5


def young(save_s: float, mttf_s: float) -> float:
    """Return Young's first-order optimum of the seconds of training between two saves."""
    return math.sqrt(2 * save_s * mttf_s)


def daly(save_s: float, mttf_s: float) -> float:
    """Return Daly's higher-order optimum of the seconds of training between two saves."""
    if save_s >= 2 * mttf_s:
        return mttf_s
    share = save_s / (2 * mttf_s)
    return young(save_s, mttf_s) * (1 + math.sqrt(share) / 3 + share / 9) - save_s


@dataclass(frozen=True)
class Setting:
    """What is known of a run before it measures anything."""

    num_nodes: int
    node_mttf_h: float
    """`train.node_mttf_h`."""
    rank_bytes: int
    """What one rank copies and writes at a save."""
    asynchronous: bool
    """`train.async_save`."""


@dataclass(frozen=True)
class Measured:
    """What one life has measured so far, and the ledger of those before; None: nothing yet."""

    step_s: float | None = None
    stall_s: float | None = None
    """How long training waits for one save."""
    publish_s: float | None = None
    """From begin to publish."""
    failures: int = 0
    mttf_h: float | None = None


class Meter:
    """Remembers the latest steps and saves of this life (rank 0); starts from what the ledger says of earlier lives."""

    def __init__(self, figures: Mapping[str, float]) -> None:
        self._ledger = dict(figures)
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._stalls: deque[float] = deque(maxlen=_REMEMBERED)
        self._publishes: deque[float] = deque(maxlen=_REMEMBERED)

    def stepped(self, step_s: float) -> None:
        """Remember the seconds per step of the latest log window."""
        self._steps.append(step_s)

    def saved(self, stall_s: float, publish_s: float) -> None:
        """Remember a save in the course of training (one at a stop is waited for and would mislead)."""
        self._stalls.append(stall_s)
        self._publishes.append(publish_s)

    def measured(self) -> Measured:
        """Return medians of this life, or without them the figures of earlier lives (`Account.figures`)."""

        def latest(values: deque[float], key: str) -> float | None:
            return statistics.median(values) if values else self._ledger.get(key)

        return Measured(
            latest(self._steps, "step_s"),
            latest(self._stalls, "save_stall_s"),
            latest(self._publishes, "save_s"),
            int(self._ledger.get("failures", 0)),
            self._ledger.get("mttf_h"),
        )


@dataclass(frozen=True)
class Interval:
    """A save interval and the arithmetic that led to it."""

    steps: int
    explanation: str


def derive(measured: Measured, setting: Setting) -> Interval:
    """Derive the save interval; `measured.step_s` must be known."""
    assert measured.step_s is not None
    gigabytes = setting.rank_bytes / 1e9
    publish_s = PUBLISH_S_PER_GB * gigabytes if measured.publish_s is None else measured.publish_s
    if measured.stall_s is not None:
        stall_s, known = measured.stall_s, ""
    else:
        rate = STALL_S_PER_GB if setting.asynchronous else PUBLISH_S_PER_GB
        stall_s, known = rate * gigabytes, f" (a guess: {gigabytes:.2g} GB per rank x {rate:g} s)"
    if measured.mttf_h is not None and measured.failures >= ENOUGH_FAILURES:
        mttf_h, source = measured.mttf_h, f"the mean of {measured.failures}"
    else:
        mttf_h = setting.node_mttf_h / setting.num_nodes
        nodes = "1 node" if setting.num_nodes == 1 else f"{setting.num_nodes} nodes"
        source = f"prior: {setting.node_mttf_h:g} h per node / {nodes}"
    best_s = daly(stall_s, 3600 * mttf_h)
    cap_s = max(CAP_S, stall_s / CAP_OVERHEAD)
    floor_s = max(PUBLISHES * publish_s, measured.step_s)
    interval_s = max(min(best_s, cap_s), floor_s)
    steps = max(1, (math.ceil if interval_s == floor_s else round)(interval_s / measured.step_s))
    arithmetic = f"sqrt(2 x {duration(stall_s)} stall{known} x {_hours(mttf_h)} between failures ({source}))"
    if abs(best_s - young(stall_s, 3600 * mttf_h)) > 0.02 * best_s:
        arithmetic += ", with Daly's correction,"
    limit = ""
    if interval_s == floor_s:
        why = f"{PUBLISHES} x the {duration(publish_s)} from begin to publish"
        limit = f", raised to {why if floor_s > measured.step_s else 'one step'}"
    elif interval_s == cap_s:
        share = f" (saves cost {100 * CAP_OVERHEAD:g} % of the time then)" if cap_s > CAP_S else ""
        limit = f", but at most {duration(cap_s)}{share}, because a preemption may come without notice"
    explanation = (
        f"save every {steps} step{'s' * (steps != 1)} ({duration(steps * measured.step_s)}): "
        f"{arithmetic} = {duration(best_s)}{limit}; {duration(measured.step_s)} a step"
    )
    return Interval(steps, explanation)


class SaveSchedule:
    """Says when a save is due; the same on every rank, as long as every rank calls it with the same numbers."""

    def __init__(self, save_every: int | None, *, keep_every: int, first_step: int, setting: Setting) -> None:
        self._save_every, self._keep_every, self._setting = save_every, keep_every, setting
        self._last = first_step
        self._waits_for_first = save_every is None
        self.steps: int | None = save_every
        """The interval; None while `train.save_every` is null and nothing is measured."""
        self.explanation = "" if save_every is None else f"save every {save_every} steps: train.save_every"

    @property
    def derives(self) -> bool:
        """Say whether the interval follows from measurements."""
        return self._save_every is None

    @property
    def waits_for_first(self) -> bool:
        """Say whether no save is known, of this life or an earlier one: the first is made early (FIRST_SAVE_S)."""
        return self._waits_for_first

    def learn(self, measured: Measured) -> bool:
        """Derive the interval from rank 0's measurements; returns whether it changed and is to be explained anew."""
        if not self.derives:
            return False
        if measured.stall_s is not None:
            self._waits_for_first = False
        if measured.step_s is None:
            return False
        found = derive(measured, self._setting)
        if self.steps is not None and abs(found.steps - self.steps) <= CHANGE * self.steps:
            return False
        self.steps, self.explanation = found.steps, found.explanation
        return True

    def due(self, step: int, *, early: bool = False) -> bool:
        """Say whether the state after `step` is to be saved; `early` says that it is time for the first save."""
        if early and self._waits_for_first:
            return True
        if self._keep_every and step % self._keep_every == 0:
            return True
        if self._save_every is not None:
            return step % self._save_every == 0
        return self.steps is not None and step - self._last >= self.steps

    def saved(self, step: int) -> None:
        """Remember that a save of `step` began, for whatever reason."""
        self._last, self._waits_for_first = step, False


def _hours(hours: float) -> str:
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:.0f} h"
