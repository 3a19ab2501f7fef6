"""The ledger of a run: where the time of all its lives went, computed from the events in attempts.jsonl; no IO.

A life is one start of the ranks; a requeue begins the next one. The terms are those of Meta's "Revisiting Reliability
in Large-Scale Machine Learning Research Clusters" (HPCA 2025, arXiv 2410.21680): ETTR, the effective training time
ratio, is productive time / wall time, where the wall time also counts waiting in the queue, and work that is done
again after a failure is not productive. The fields of `Life` and `Account` define every other term.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mvit.ledger_events import Record, Span, kept_steps, records, seconds_up_to, spans

Event = Mapping[str, Any]

FAILURES = ("error", "killed", "hung", "node", "lost")
"""Ends that something broke for: they make up the mean time to failure."""
INTERRUPTIONS = (*FAILURES, "preempted", "signalled", "fenced")
"""Ends that nobody wanted, failures or not."""


@dataclass(frozen=True)
class Life:
    """One life; its parts add up to what they are parts of.

    queue_s + duration_s + queue_after_s + down_s is its share of the run's wall time, and
    duration_s = start_s + productive_s + lost_s + stall_s + evaluate_s + tail_s + other_s.
    """

    attempt: int
    hosts: tuple[str, ...]
    world_size: int
    gpus: int
    """0: the ranks computed on CPUs."""
    kind: str | None
    """How its ranks ended; None for a life that is queued or running. A job cancelled after it went back to the queue
    keeps the kind that its ranks ended by."""
    detail: str
    first_step: int | None
    """First step it completed; None without one."""
    last_step: int | None
    """Last step known to be complete (a life without a record may have done a few more)."""
    lost_steps: int
    """Steps up to `last_step` that are not part of the run's present state: the checkpoint was older."""
    down_s: float
    """Before it: nobody had asked Slurm for it yet after a life that failed (waiting for a person)."""
    paused_s: float
    """The same after a finished or cancelled life or `mvit stop`: wanted, so no part of the wall time."""
    queue_s: float
    """Waiting for its start since it was submitted or requeued; for a life that Slurm requeued by itself since the
    last sign of the life before."""
    queue_after_s: float
    """Waiting since it was requeued, without a next life so far."""
    duration_s: float
    """From its start to its end, or until now."""
    start_s: float
    """From the start until the first step: imports, process group, model, data, restore. The whole duration of a life
    that did not complete a step."""
    restore_s: float
    """Part of `start_s`: reading, verifying and loading the checkpoint."""
    productive_s: float
    """Inside steps that were kept. A step that was done again counts once, in the life whose result counts."""
    lost_s: float
    """Inside steps that were not kept."""
    stall_s: float
    """Training waited for a save."""
    evaluate_s: float
    tail_s: float
    """From its last report to its end (or now): steps nobody has reported, a hang until it was found, leaving."""
    other_s: float
    """What no event accounts for; the whole duration of lives from before these events were kept."""
    data_wait_s: float
    """Part of the time inside steps: waiting for batches."""

    @property
    def devices(self) -> int:
        """GPUs, or ranks where there are none."""
        return self.gpus or self.world_size

    @property
    def started(self) -> bool:
        return self.duration_s > 0


@dataclass(frozen=True)
class Account:
    """All lives of a run until now. Ratios are None while they would divide by zero."""

    lives: tuple[Life, ...]
    step: int
    """Step of the run's present state: what the next step builds on."""
    wall_s: float
    """Since the first submission until the last end (until now for a run that is queued or runs), without pauses."""
    run_s: float
    """Sum of the lives' durations."""
    queue_s: float
    down_s: float
    start_s: float
    productive_s: float
    lost_s: float
    stall_s: float
    evaluate_s: float
    tail_s: float
    other_s: float
    """The parts of the wall time, summed over the lives: queue_s + down_s + run_s = wall_s."""
    step_s: float | None
    """Seconds per step of the last life that reports them."""
    save_stall_s: float | None
    """The shortest stall of the last five saves (a save at a stop is waited for, which says nothing of the others)."""
    save_s: float | None
    """The longest time from begin to publish of the last five saves."""

    @property
    def ettr(self) -> float | None:
        """Goodput: productive time / wall time."""
        return _ratio(self.productive_s, self.wall_s)

    @property
    def ettr_running(self) -> float | None:
        """Productive time / time the ranks ran: without queue and waiting for a person."""
        return _ratio(self.productive_s, self.run_s)

    @property
    def checkpoint_overhead(self) -> float | None:
        """Time that training waited for saves / time the ranks ran."""
        return _ratio(self.stall_s, self.run_s)

    @property
    def ends(self) -> dict[str, int]:
        """Number of lives by the kind of their end, the most frequent first."""
        return dict(Counter(life.kind for life in self.lives if life.kind is not None).most_common())

    @property
    def failures(self) -> int:
        return sum(self.ends.get(kind, 0) for kind in FAILURES)

    @property
    def interruptions(self) -> int:
        return sum(self.ends.get(kind, 0) for kind in INTERRUPTIONS)

    @property
    def mttf_s(self) -> float | None:
        """Mean time to failure: time the ranks ran / failures."""
        return _ratio(self.run_s, self.failures)

    @property
    def mtti_s(self) -> float | None:
        """Mean time to interruption: time the ranks ran / interruptions."""
        return _ratio(self.run_s, self.interruptions)

    @property
    def gpu_hours(self) -> float:
        """Devices x time the ranks ran; devices are GPUs, or ranks on CPUs."""
        return sum(life.devices * life.duration_s for life in self.lives) / 3600

    @property
    def lost_gpu_hours(self) -> float:
        """Devices x time they ran only because of interruptions: steps not kept, tails of interrupted lives, and the
        start-up of every life but the first that started."""
        return sum(life.devices * seconds for life, seconds in self._lost_running()) / 3600

    @property
    def lost_hours(self) -> float:
        """Wall time that an undisturbed run would not have needed: the time of `lost_gpu_hours`, and queue and waiting
        for a person but for the first queue."""
        waiting = self.down_s + sum(life.queue_s for life in self.lives[1:])
        waiting += sum(life.queue_after_s for life in self.lives)
        return (sum(seconds for _, seconds in self._lost_running()) + waiting) / 3600

    def _lost_running(self) -> list[tuple[Life, float]]:
        first = next((life for life in self.lives if life.started), None)
        return [
            (
                life,
                life.lost_s
                + (life.tail_s if life.kind in INTERRUPTIONS else 0.0)
                + (life.start_s if life is not first else 0.0),
            )
            for life in self.lives
        ]

    def figures(self) -> dict[str, float]:
        """Return the known ones of the figures that TensorBoard shows and the save interval follows from."""
        found = {
            "ettr": self.ettr,
            "ettr_running": self.ettr_running,
            "mttf_h": None if self.mttf_s is None else self.mttf_s / 3600,
            "failures": float(self.failures),
            "checkpoint_overhead": self.checkpoint_overhead,
            "lost_gpu_hours": self.lost_gpu_hours,
            "step_s": self.step_s,
            "save_stall_s": self.save_stall_s,
            "save_s": self.save_s,
        }
        return {key: value for key, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain values, for JSON."""
        derived = (
            "ettr",
            "ettr_running",
            "checkpoint_overhead",
            "failures",
            "interruptions",
            "mttf_s",
            "mtti_s",
            "gpu_hours",
            "lost_gpu_hours",
            "lost_hours",
            "ends",
        )
        return {key: getattr(self, key) for key in derived} | asdict(self)

    def __str__(self) -> str:
        if not self.lives:
            return "no life on record"
        parts = {
            "steps kept": self.productive_s,
            "steps done again": self.lost_s,
            "start-up": self.start_s,
            "saves": self.stall_s,
            "evaluation": self.evaluate_s,
            "after the last report": self.tail_s,
            "other": self.other_s,
            "queue": self.queue_s,
            "waiting for a person": self.down_s,
        }
        shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.05)
        lives = [life for life in self.lives if life.started]  # not a job that was cancelled in the queue
        ends = Counter(life.kind for life in lives if life.kind is not None).most_common()
        kinds = ", ".join(f"{count} {kind}" for kind, count in ends)
        devices = "GPU" if any(life.gpus for life in self.lives) else "CPU rank"
        lines = [
            f"goodput (ETTR) {_percent(self.ettr)} of {duration(self.wall_s)} since the first submission, "
            f"{_percent(self.ettr_running)} of the {duration(self.run_s)} it ran",
            f"time: {shown or 'none yet'}",
            f"lives: {len(lives)}" + (f" ({kinds})" if kinds else ""),
            f"saves: training waited {duration(self.stall_s)}, {_percent(self.checkpoint_overhead)} of the time it ran",
            f"lost: {self.lost_hours:.2f} h of wall time, {self.lost_gpu_hours:.2f} of {self.gpu_hours:.2f} "
            f"{devices}-hours",
        ]
        if self.mttf_s is not None or self.mtti_s is not None:
            failure = f"one failure per {duration(self.mttf_s)}" if self.mttf_s is not None else "no failure"
            interruption = "" if self.mtti_s is None else f", one interruption per {duration(self.mtti_s)}"
            lines[2] += f"; {failure}{interruption} of running"
        return "\n".join(lines)


def account(events: Sequence[Event], now: float) -> Account:
    """Account for a run at the time `now` (seconds since the epoch).

    `events` are the lines of attempts.jsonl in their order. Unknown events and fields are passed over, missing ones
    make parts unknown (`other_s`), so that files of older versions can be read.
    """
    found = records(events)
    now = max([now, *(record.last_time for record in found)])
    kept, step = kept_steps(found)
    lives = tuple(
        _life(record, span, kept_until) for record, span, kept_until in zip(found, spans(found, now), kept, strict=True)
    )
    names = [part.name for part in fields(Account) if part.name.endswith("_s") and part.name in Life.__annotations__]
    totals: dict[str, float] = {name: sum(getattr(life, name) for life in lives) for name in names}
    totals["queue_s"] += sum(life.queue_after_s for life in lives)
    run_s = sum(life.duration_s for life in lives)
    saves = [save for record in found for save in record.saves][-5:]
    return Account(
        lives=lives,
        step=step,
        wall_s=run_s + totals["queue_s"] + totals["down_s"],
        run_s=run_s,
        step_s=next((record.step_s for record in reversed(found) if record.step_s is not None), None),
        save_stall_s=min((stall for *_, stall in saves), default=None),
        save_s=max((seconds for _, seconds, _ in saves), default=None),
        **totals,
    )


def _life(record: Record, span: Span, kept_until: int | None) -> Life:
    ran = span.stopped - span.started
    base, reached = record.base or 0, max(record.reached or 0, kept_until or 0)
    done = reached > base
    tail_s, points, parts = 0.0, list(record.points), (0.0, 0.0, 0.0)
    if not done:  # it ended while it started
        start_s, other_s, points = (ran, 0.0, []) if record.told_of_parts else (0.0, ran, [])
    else:
        tail_s = _within(span.stopped - (record.last_report or span.stopped), ran)
        if record.step_s is not None and reached > points[-1][0]:  # steps known from elsewhere than its reports
            unreported_s = min(tail_s, record.step_s * (reached - points[-1][0]))
            points.append((reached, points[-1][1] + unreported_s))
            tail_s -= unreported_s
        parts = (points[-1][1] if points else 0.0, record.stall_s, record.evaluate_s)
        # Reports may overlap with the start (the first step is in both) and, with a clock that was set, the duration.
        scale = min(1.0, (ran - tail_s) / sum(parts)) if sum(parts) > 0 else 1.0
        points = [(step, seconds * scale) for step, seconds in points]
        parts = (parts[0] * scale, parts[1] * scale, parts[2] * scale)
        start_s = _within((record.ready or span.started) - span.started, ran - tail_s - sum(parts))
        other_s = max(0.0, ran - tail_s - sum(parts) - start_s)
    train_s, stall_s, evaluate_s = parts
    productive_s = seconds_up_to(points, kept_until) if kept_until is not None else 0.0
    idle = span.asked - span.before
    return Life(
        attempt=record.attempt,
        hosts=record.hosts,
        world_size=record.world_size,
        gpus=record.gpus,
        kind=record.kind,
        detail="" if record.end is None else str(record.end.get("detail") or ""),
        first_step=base + 1 if done else None,
        last_step=reached if done else None,
        lost_steps=reached - (base if kept_until is None else kept_until) if done else 0,
        down_s=0.0 if span.wanted_pause else idle,
        paused_s=idle if span.wanted_pause else 0.0,
        queue_s=span.started - span.asked,
        queue_after_s=span.after - span.stopped,
        duration_s=ran,
        start_s=start_s,
        restore_s=min(record.restore_s, start_s),
        productive_s=productive_s,
        lost_s=max(0.0, train_s - productive_s),  # rounded, their difference may be below
        stall_s=stall_s,
        evaluate_s=evaluate_s,
        tail_s=tail_s,
        other_s=other_s,
        data_wait_s=min(record.data_wait_s, train_s),
    )


def _within(value: float, limit: float) -> float:
    return max(0.0, min(value, limit))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _percent(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{100 * ratio:.3g} %"


def duration(seconds: float) -> str:
    """Return a time span as a person says it: 38.4 h, 8.2 min, 0.88 s."""
    for unit, size, least in (("d", 86400.0, 2.0), ("h", 3600.0, 2.0), ("min", 60.0, 1.0)):
        if seconds >= least * size:
            value = seconds / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
