"""What follows a life: each kind of trouble has a budget of its own, and a node blamed twice is left out."""

from typing import Any

import pytest

from launcher.ending import Ending
from launcher.policy import Budgets, decide, excluded

BUDGETS = Budgets()


def _history(*lives: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of lives (kind, step of the checkpoint it started from, facts), the last one still open."""
    events: list[dict[str, Any]] = []
    for attempt, (kind, start, facts) in enumerate(lives, start=1):
        events.append({"event": "start", "attempt": attempt, "time": 0.0, "checkpoint_step": start})
        if kind:
            events.append({"event": "end", "attempt": attempt, "time": 0.0, "cause": "failed", "kind": kind} | facts)
    return events


@pytest.mark.parametrize(
    ("kind", "requeue"),
    [
        ("finished", False),
        ("user_stop", False),
        ("cancelled", False),
        ("fenced", False),
        ("signalled", True),
        ("preempted", True),
        ("error", True),
        ("killed", True),
        ("hung", True),
        ("node", True),
        ("lost", True),
    ],
)
def test_the_kind_of_the_end_decides_the_first_time(kind: Any, requeue: bool) -> None:
    assert decide(Ending(kind, ""), _history(("", 0, {})), 0, BUDGETS).requeue is requeue


def test_a_cluster_file_without_requeue_ends_the_job_whatever_happened() -> None:
    for kind in ("signalled", "error", "node"):
        decision = decide(Ending(kind, ""), _history(("", 0, {})), 0, Budgets(requeue=False))
        assert not decision.requeue
        assert "requeue: false" in decision.reason


def test_three_crashes_in_a_row_without_a_newer_checkpoint_end_the_job() -> None:
    two = _history(("killed", 10, {}), ("hung", 10, {}), ("", 10, {}))
    decision = decide(Ending("error", "", error="E", step=12), two, 10, BUDGETS)
    assert not decision.requeue
    assert "crash 3 of 3 in a row without a newer checkpoint (max_failures_without_progress)" in decision.reason


def test_a_newer_checkpoint_starts_the_count_anew() -> None:
    progressed = _history(("killed", 0, {}), ("killed", 0, {}), ("", 10, {}))
    assert decide(Ending("killed", ""), progressed, 10, BUDGETS).requeue
    this_life_saved = _history(("killed", 0, {}), ("killed", 0, {}), ("", 0, {}))
    assert decide(Ending("killed", ""), this_life_saved, 10, BUDGETS).requeue
    assert not decide(Ending("killed", ""), this_life_saved, 0, BUDGETS).requeue


def test_preemptions_are_free_and_do_not_hide_crashes() -> None:
    many = _history(*[("preempted", 10, {})] * 50, ("", 10, {}))
    assert decide(Ending("preempted", ""), many, 10, BUDGETS).requeue
    assert decide(Ending("killed", ""), many, 10, BUDGETS).requeue
    mixed = _history(("killed", 10, {}), ("preempted", 10, {}), ("killed", 10, {}), ("signalled", 10, {}), ("", 10, {}))
    assert not decide(Ending("killed", ""), mixed, 10, BUDGETS).requeue


def test_node_faults_have_their_own_budget() -> None:
    nine = _history(*[("node", 10, {})] * 9, ("", 10, {}))
    assert decide(Ending("killed", ""), nine, 10, BUDGETS).requeue, "they are no crashes"
    decision = decide(Ending("lost", ""), nine, 10, BUDGETS)
    assert not decision.requeue
    assert "node fault 10 of 10" in decision.reason


def test_the_same_error_at_the_same_step_stops_at_once() -> None:
    history = _history(("error", 10, {"error": "ValueError at f", "step": 12}), ("", 10, {}))
    again = decide(Ending("error", "", error="ValueError at f", step=12), history, 10, BUDGETS)
    assert not again.requeue
    assert "the same error at the same step 12 as in life 1" in again.reason
    assert decide(Ending("error", "", error="ValueError at f", step=13), history, 10, BUDGETS).requeue
    assert decide(Ending("error", "", error="OSError at g", step=12), history, 10, BUDGETS).requeue


def test_the_same_error_counts_with_a_preemption_between() -> None:
    history = _history(("error", 10, {"error": "E", "step": 12}), ("preempted", 10, {}), ("", 10, {}))
    assert not decide(Ending("error", "", error="E", step=12), history, 10, BUDGETS).requeue


def test_runs_of_before_kinds_were_recorded_still_count() -> None:
    old = [event for event in _history(("", 0, {}), ("", 0, {}), ("", 0, {}))]
    old += [{"event": "end", "attempt": attempt, "time": 0.0, "cause": "failed"} for attempt in (1, 2)]
    assert not decide(Ending("killed", ""), old, 0, BUDGETS).requeue


def _blame(attempt: int, time: float, *hosts: str) -> dict[str, Any]:
    return {"event": "end", "attempt": attempt, "time": time, "cause": "failed", "kind": "hung", "blamed": list(hosts)}


def test_a_node_blamed_twice_is_left_out_until_a_day_after_the_last_blame() -> None:
    hour = 3600.0
    history = [_blame(1, 0.0, "a"), _blame(2, 5 * hour, "b"), _blame(3, 10 * hour, "a")]
    found = excluded(history, 11 * hour, BUDGETS)
    assert set(found) == {"a"}
    until, why = found["a"]
    assert (until, why) == (34 * hour, "life 1: hung; life 3: hung")
    assert excluded(history, 25 * hour, BUDGETS) == {}, "the first blame is older than a day"


def test_one_life_that_is_recorded_twice_blames_once() -> None:
    assert excluded([_blame(1, 0.0, "a"), _blame(1, 1.0, "a")], 2.0, BUDGETS) == {}


def test_exclusion_can_be_turned_off() -> None:
    assert excluded([_blame(1, 0.0, "a"), _blame(2, 1.0, "a")], 2.0, Budgets(exclude_after=0)) == {}
