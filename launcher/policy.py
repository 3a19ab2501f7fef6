"""What follows a life: run again or end. Pure rules over the ledger's ends, with a budget for each kind of trouble."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.ending import Ending

# Troubles of the surroundings, not of the code: they may pass, so that trying again is worth a budget's while.
_PASSING = re.compile(
    r"\btime(d[- ]?)?out\b|TimeoutError|\bconnection (refused|reset|closed|aborted)|Connection\w*Error|\bunreachable\b|"
    r"\bbroken pipe\b|\btemporar(y|ily) (failure|unavailable)|\bno space left\b|\bquota exceeded\b|DistNetworkError|"
    r"DistStoreError|\bremote process",
    re.IGNORECASE,
)
CRASHES = ("error", "killed", "hung", "failed")  # "failed": of runs from before kinds were recorded
NODE_FAULTS = ("node", "lost")
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Budgets:
    """How often a run may fail in a row without a newer checkpoint; being preempted is free."""

    requeue: bool = True
    max_crashes: int = 3
    max_node_faults: int = 10
    exclude_after: int = 2
    """Blames after which a node is left out, 0: never."""
    exclude_hours: float = 24.0
    """How long, from the last blame; older blames do not count."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a batch job after one life, and why."""

    requeue: bool
    reason: str


def decide(
    ending: Ending, history: Sequence[Mapping[str, Any]], attempt: int, step_now: int, budgets: Budgets
) -> Decision:
    """Decide after life `attempt` that ended as `ending`, its checkpoints reaching `step_now`.

    `history` are the ledger's events, this life's end not among them, and no start if it did not come so far.
    """
    if ending.kind in ("finished", "user_stop", "cancelled"):
        return Decision(False, ending.detail)
    if ending.kind == "fenced":
        return Decision(False, "a later life runs")
    if not budgets.requeue:
        return Decision(False, "the cluster file says requeue: false")
    if ending.kind in ("signalled", "preempted"):
        return Decision(True, "preemptions and time limits are free")
    lives = _without_progress(history, attempt, step_now)
    before = _crash_before(history, attempt)
    if (
        before is not None
        and _is_code(ending)
        and (before.get("error"), before.get("step")) == (ending.error, ending.step)
    ):
        where = "before the first step" if ending.step is None else f"in step {ending.step + 1}"
        return Decision(
            False,
            f"the same error {where} as in life {before['attempt']}: trying again would only burn the allocation. "
            "Mend it and `mvit resume`",
        )
    if ending.kind in NODE_FAULTS:
        count = 1 + sum(life["kind"] in NODE_FAULTS for life in lives)
        return _within(count, budgets.max_node_faults, "node fault", "max_node_faults")
    count = 1 + sum(life["kind"] in CRASHES for life in lives)
    return _within(count, budgets.max_crashes, "crash", "max_failures_without_progress")


def _crash_before(history: Sequence[Mapping[str, Any]], current: int) -> Mapping[str, Any] | None:
    """Return the end of the newest life before `current` that crashed.

    Whether a checkpoint was published since does not matter: one of a step before the error's helps no more than none.
    """
    ends = {event["attempt"]: event for event in history if event["event"] == "end" and event["attempt"] < current}
    crashed = [attempt for attempt, end in ends.items() if end.get("kind", end["cause"]) in CRASHES]
    return ends[max(crashed)] if crashed else None


def _is_code(ending: Ending) -> bool:
    if ending.kind != "error" or ending.error is None:
        return False
    name, _, rest = ending.error.partition(" at ")
    return not _PASSING.search(f"{name}: {rest.partition(': ')[2]}")  # not the name of a file


def _within(count: int, limit: int, what: str, key: str) -> Decision:
    told = f"{what} {count} of {limit} in a row without a newer checkpoint ({key})"
    return Decision(count < limit, f"{told}; {'trying again' if count < limit else 'giving up'}")


def _without_progress(history: Sequence[Mapping[str, Any]], current: int, step_now: int) -> list[Mapping[str, Any]]:
    """Return the ends, newest first, of the lives before life `current` since a checkpoint was published.

    A life made progress if its successor started from a higher step than it did itself. A signalled stop is progress
    only if it saved something new, so that a crash that repeats between preemptions is still counted.
    """
    starts = {event["attempt"]: event.get("checkpoint_step", 0) for event in history if event["event"] == "start"}
    ends = {event["attempt"]: event for event in history if event["event"] == "end"}
    step_after = starts.get(current, step_now)
    if step_now > step_after:
        return []  # this very life came further
    found: list[Mapping[str, Any]] = []
    for attempt in range(current - 1, 0, -1):
        step_before = starts.get(attempt, step_after)
        if step_after > step_before:
            break
        if attempt in ends:
            end = ends[attempt]
            found.append({**end, "kind": end.get("kind", end["cause"])})
        step_after = step_before
    return found


def excluded(history: Sequence[Mapping[str, Any]], now: float, budgets: Budgets) -> dict[str, tuple[float, str]]:
    """Return the nodes to leave out: {host: (until, why)}, those blamed often enough within the last hours."""
    if not budgets.exclude_after:
        return {}
    window = budgets.exclude_hours * _HOUR_S
    blames: dict[str, list[Mapping[str, Any]]] = {}
    for event in history:
        if event["event"] == "end" and event["time"] > now - window:
            for host in event.get("blamed", ()):
                blames.setdefault(host, []).append(event)
    return {
        host: (events[-1]["time"] + window, "; ".join(f"life {e['attempt']}: {e['kind']}" for e in events))
        for host, events in blames.items()
        if len({event["attempt"] for event in events}) >= budgets.exclude_after
    }
