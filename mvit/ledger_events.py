"""What the events of attempts.jsonl say about each life: when it waited and ran, and which of its steps were kept."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Event = Mapping[str, Any]

WANTED = ("finished", "user_stop", "cancelled")
"""Ends after which nobody wants the run to go on."""
_SAVED = ("finished", "user_stop", "signalled")  # their last step is in a checkpoint


@dataclass(frozen=True)
class Record:
    """The events of one attempt, as far as they are there and make sense."""

    attempt: int
    submitted: float | None
    started: float | None
    """None: it never left the queue."""
    is_slurm: bool
    hosts: tuple[str, ...]
    world_size: int
    gpus: int
    told_of_parts: bool
    """False for a life from before its parts were recorded."""
    base: int | None
    """The step it continued from; None if that is not known."""
    ready: float | None
    """When its first step was complete (or, without one, its state restored)."""
    restore_s: float
    reached: int | None
    """Last step known to be complete; `base` if it did none."""
    points: tuple[tuple[int, float], ...]
    """Seconds inside steps of this life, up to each step that was reported; from (base, 0) on."""
    stall_s: float
    evaluate_s: float
    data_wait_s: float
    last_report: float | None
    """When it last said how far it was."""
    saves: tuple[tuple[int, float, float], ...]
    """Step, seconds from begin to publish, and seconds of stall of each save."""
    end: Event | None
    """How the ranks ended."""
    kind: str | None
    left_queue: float | None
    """When a job that had gone back to the queue left it without another life, cancelled for one."""
    left_kind: str | None
    """How it stands since: the kind of the last end."""
    last_own_time: float
    """Time of the last event that is not an end: ends may be written by others, and later."""
    last_time: float

    @property
    def steps(self) -> int:
        return 0 if self.base is None or self.reached is None else self.reached - self.base

    @property
    def step_s(self) -> float | None:
        """Seconds per step."""
        (first, _), (last, seconds) = (self.points[0], self.points[-1]) if self.points else ((0, 0.0), (0, 0.0))
        return seconds / (last - first) if last > first and seconds > 0 else None

    @property
    def requeued(self) -> bool:
        return self.end is not None and bool(self.end.get("requeued"))


@dataclass(frozen=True)
class Span:
    """When a life waited and ran, in seconds since the epoch; each moment of a run belongs to one life's span."""

    before: float
    asked: float
    """Its queue time begins."""
    started: float
    stopped: float
    after: float
    """Its requeued job has waited in the queue until then without another life."""
    wanted_pause: bool
    """Between `before` and `asked` nobody wanted the run to go on."""


def records(events: Sequence[Event]) -> list[Record]:
    """Sort events by attempt; those without an attempt or a time are passed over."""
    by_attempt: dict[int, list[Event]] = {}
    for event in events:
        attempt, time = event.get("attempt"), _number(event, "time")
        if isinstance(attempt, int) and time is not None and isinstance(event.get("event"), str):
            by_attempt.setdefault(attempt, []).append(event)
    found = [life for attempt in sorted(by_attempt) if (life := _record(attempt, by_attempt[attempt])) is not None]
    last_start = max((index for index, life in enumerate(found) if life.started is not None), default=-1)
    return [
        replace(life, kind="lost", left_kind="lost")  # a successor ran, so it is over, and nobody saw how
        if index < last_start and life.started is not None and life.end is None
        else life
        for index, life in enumerate(found)
    ]


def _record(attempt: int, events: Sequence[Event]) -> Record | None:
    def named(name: str) -> list[Event]:
        return [event for event in events if event["event"] == name]

    lived = [e for e in events if e["event"] in ("start", "restored", "first_step", "progress", "saved")]
    ends, submits, progress, saved = named("end"), named("submit"), named("progress"), named("saved")
    if not (lived or submits or ends):
        return None
    start: Event = next(iter(named("start")), {})
    restored, first = next(iter(named("restored")), {}), next(iter(named("first_step")), {})
    ends = [_completed(e, lived, saved) for e in ends]
    end = next((e for e in ends if e.get("requeued")), ends[-1] if ends else None)
    stays = not ends or bool(ends[-1].get("requeued"))
    job = {key: value for event in (*submits, start) for key, value in event.items() if value is not None}
    base = _whole(restored, "step", _whole(start, "checkpoint_step"))
    told = [step for e in (first, *progress, *saved, *ends) if (step := _whole(e, "step")) is not None]
    if not told and not restored and ends:  # an old file knows checkpoints only
        told = [step for e in ends if (step := _whole(e, "checkpoint_step")) is not None]
    reached = None if base is None else max([base, *told])
    hosts = job.get("hosts")
    own = [float(e["time"]) for e in events if e["event"] != "end"]
    return Record(
        attempt=attempt,
        submitted=float(submits[0]["time"]) if submits else None,
        started=min(float(e["time"]) for e in lived) if lived else None,
        is_slurm=job.get("executor") == "slurm",
        hosts=tuple(str(host) for host in hosts) if isinstance(hosts, list | tuple) else (),
        world_size=_whole(job, "world_size", 1) or 1,
        gpus=_whole(job, "gpus", 0) or 0,
        told_of_parts="gpus" in start or bool(restored or first or progress),
        base=base,
        ready=_number(first, "time", _number(restored, "time")),
        restore_s=_number(restored, "seconds") or 0.0,
        reached=reached,
        points=_points(base, progress),
        stall_s=max(_largest(progress, "stall_s"), sum(max(0.0, _number(e, "stall_s") or 0.0) for e in saved)),
        evaluate_s=_largest(progress, "evaluate_s"),
        data_wait_s=_largest(progress, "data_wait_s"),
        last_report=max((float(e["time"]) for e in (first, *progress) if e), default=None),
        saves=tuple(
            (_whole(e, "step", 0) or 0, _number(e, "seconds") or 0.0, max(0.0, _number(e, "stall_s") or 0.0))
            for e in saved
        ),
        end=end,
        kind=None if end is None else _kind(end),
        left_queue=float(ends[-1]["time"]) if end is not None and end.get("requeued") and not stays else None,
        left_kind=_kind(ends[-1]) if ends else None,
        last_own_time=max(own, default=float(ends[-1]["time"]) if ends else float(events[-1]["time"])),
        last_time=max(float(e["time"]) for e in (*(e for e in events if e["event"] != "end"), *ends)),
    )


def _completed(end: Event, lived: Sequence[Event], saved: Sequence[Event]) -> Event:
    """Return an end at the time when it happened.

    Who writes it later says when that was. `mvit cancel` writes it at once, and the ranks may live on and save.
    """
    time = float(end["time"])
    if (ended := _number(end, "ended")) is not None:
        return {**end, "time": min(time, ended)}
    if end.get("kind") != "cancelled":
        return end
    steps = [step for e in saved if float(e["time"]) > time and (step := _whole(e, "step")) is not None]
    newest = {"checkpoint_step": steps[-1]} if steps else {}
    return {**end, **newest, "time": max([time, *(float(e["time"]) for e in lived)])}


def _points(base: int | None, progress: Sequence[Event]) -> tuple[tuple[int, float], ...]:
    if base is None:
        return ()
    points = [(base, 0.0)]
    for event in progress:
        step, seconds = _whole(event, "step"), _number(event, "train_s")
        if step is not None and seconds is not None and step >= points[-1][0] and seconds >= points[-1][1]:
            while len(points) > 1 and points[-1][0] == step:
                points.pop()  # the last word on a step counts
            points.append((step, seconds))
    return tuple(points)


def _kind(end: Event) -> str:
    """Return an end's kind; of older files, which have a cause only, the nearest."""
    if isinstance(kind := end.get("kind"), str):
        return kind
    match end.get("cause"):
        case "finished":
            return "finished"
        case "stopped":
            return "signalled" if end.get("requeued") else "user_stop"
        case _:
            return "lost" if "without a record" in str(end.get("detail")) else "error"


def spans(found: Sequence[Record], now: float) -> list[Span]:
    """Divide the time from the first submission to `now` (or the last end) among the lives."""
    divided: list[Span] = []
    for index, record in enumerate(found):
        previous = found[index - 1] if index else None
        following = found[index + 1] if index + 1 < len(found) else None
        asked = _asked(previous, record)
        before = divided[-1].after if divided else asked
        asked = max(asked, before)
        closing = record.last_time if record.end is not None else now
        limit = closing if following is None else max(asked, following.started or following.submitted or closing)
        if record.started is None:  # it waited only
            left = closing if following is None or record.end is not None else (following.submitted or limit)
            started = stopped = after = max(asked, min(left, limit))
        else:
            started = max(asked, min(record.started, limit))
            stopped = max(started, min(_stopped(record, following, now), limit))
            after = stopped
            if record.left_queue is not None:
                after = max(stopped, min(record.left_queue, limit))
            elif record.requeued and following is None:
                after = max(stopped, now)
        wanted_pause = previous is not None and previous.left_kind in WANTED
        divided.append(Span(before, asked, started, stopped, after, wanted_pause))
    return divided


def _asked(previous: Record | None, record: Record) -> float:
    """Return when the queue time of a life begins."""
    if previous is not None and previous.requeued and previous.left_queue is None and previous.end is not None:
        return float(previous.end["time"])
    if record.submitted is not None:
        return record.submitted
    if previous is not None and record.is_slurm:  # Slurm requeued by itself
        return previous.last_own_time
    return record.last_time if record.started is None else record.started


def _stopped(record: Record, following: Record | None, now: float) -> float:
    """Return when the ranks ended."""
    if record.end is None:
        return now if following is None else record.last_own_time
    requeued_by_slurm = following is not None and following.is_slurm and following.submitted is None
    told = _number(record.end, "ended") is not None
    if not told and not record.requeued and (record.kind == "lost" or requeued_by_slurm):
        return record.last_own_time  # its end was found and written by somebody else, any time later
    return float(record.end["time"])


def kept_steps(found: Sequence[Record]) -> tuple[list[int | None], int]:
    """Return up to which step the work of each life is part of the run's present state (None: none of it), and that
    state's step.

    The state is followed back from the last life to the one whose step it continued from, and so on.
    """
    kept: list[int | None] = [None] * len(found)
    head = position = _present_step(found)
    index = len(found)
    while True:
        earlier = [i for i in range(index) if (base := found[i].base) is not None and base < position]
        covering = [i for i in earlier if (found[i].reached or 0) >= position]
        if not earlier:
            return kept, head
        # Without a life that says it reached the step, it was the last one: it died before it could say so.
        index = (covering or earlier)[-1]
        kept[index] = position
        base = found[index].base
        assert base is not None
        position = base


def _present_step(found: Sequence[Record]) -> int:
    for record in reversed(found):
        if record.base is None or record.reached is None:
            continue
        if record.end is None and record is found[-1]:
            return record.reached
        published = None if record.end is None else _whole(record.end, "checkpoint_step")
        if record.kind in _SAVED:
            return max(record.reached, published or 0)
        return max([record.base, *(step for step, _, _ in record.saves)]) if published is None else published
    return 0


def seconds_up_to(points: Sequence[tuple[int, float]], step: int) -> float:
    """Return the time inside steps up to `step`, between two reports in proportion."""
    if not points or step <= points[0][0]:
        return 0.0
    index = bisect_left(points, step, key=lambda point: point[0])
    if index == len(points):
        return points[-1][1]
    (low, since), (high, until) = points[index - 1], points[index]
    return since + (until - since) * (step - low) / (high - low)


def _largest(events: Sequence[Event], key: str) -> float:
    return max([0.0, *(value for e in events if (value := _number(e, key)) is not None)])


def _number(event: Event, key: str, default: float | None = None) -> float | None:
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return default
    return float(value)


def _whole(event: Event, key: str, default: int | None = None) -> int | None:
    number = _number(event, key)
    return default if number is None else int(number)
