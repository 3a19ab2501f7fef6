"""What follows a life: each kind of trouble has a budget of its own, and a node blamed twice is left out."""

from typing import Any

import pytest

from launcher.ending import Ending
from launcher.policy import Budgets, Decision, decide, excluded

BUDGETS = Budgets()


def _history(*lives: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of lives (kind, step of the checkpoint it started from, facts), the last one still open."""
    events: list[dict[str, Any]] = []
    for attempt, (kind, start, facts) in enumerate(lives, start=1):
        events.append({"event": "start", "attempt": attempt, "time": 0.0, "checkpoint_step": start})
        if kind:
            events.append({"event": "end", "attempt": attempt, "time": 0.0, "cause": "failed", "kind": kind} | facts)
    return events


def _decide(ending: Ending, history: list[dict[str, Any]], step_now: int, budgets: Budgets = BUDGETS) -> Decision:
    """Decide after the last of these lives."""
    return decide(ending, history, max(event["attempt"] for event in history), step_now, budgets)


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
    assert _decide(Ending(kind, ""), _history(("", 0, {})), 0).requeue is requeue


def test_a_cluster_file_without_requeue_ends_the_job_whatever_happened() -> None:
    for kind in ("signalled", "error", "node"):
        decision = _decide(Ending(kind, ""), _history(("", 0, {})), 0, Budgets(requeue=False))
        assert not decision.requeue
        assert "requeue: false" in decision.reason


def test_three_crashes_in_a_row_without_a_newer_checkpoint_end_the_job() -> None:
    two = _history(("killed", 10, {}), ("hung", 10, {}), ("", 10, {}))
    decision = _decide(Ending("error", "", error="E", step=12), two, 10)
    assert not decision.requeue
    assert "crash 3 of 3 in a row without a newer checkpoint (max_failures_without_progress)" in decision.reason


def test_a_newer_checkpoint_starts_the_count_anew() -> None:
    progressed = _history(("killed", 0, {}), ("killed", 0, {}), ("", 10, {}))
    assert _decide(Ending("killed", ""), progressed, 10).requeue
    this_life_saved = _history(("killed", 0, {}), ("killed", 0, {}), ("", 0, {}))
    assert _decide(Ending("killed", ""), this_life_saved, 10).requeue
    assert not _decide(Ending("killed", ""), this_life_saved, 0).requeue


def test_preemptions_are_free_and_do_not_hide_crashes() -> None:
    many = _history(*[("preempted", 10, {})] * 50, ("", 10, {}))
    assert _decide(Ending("preempted", ""), many, 10).requeue
    assert _decide(Ending("killed", ""), many, 10).requeue
    mixed = _history(("killed", 10, {}), ("preempted", 10, {}), ("killed", 10, {}), ("signalled", 10, {}), ("", 10, {}))
    assert not _decide(Ending("killed", ""), mixed, 10).requeue


def test_node_faults_have_their_own_budget() -> None:
    nine = _history(*[("node", 10, {})] * 9, ("", 10, {}))
    assert _decide(Ending("killed", ""), nine, 10).requeue, "they are no crashes"
    decision = _decide(Ending("lost", ""), nine, 10)
    assert not decision.requeue
    assert "node fault 10 of 10" in decision.reason


def test_the_same_error_at_the_same_step_stops_at_once() -> None:
    history = _history(("error", 10, {"error": "ValueError at f", "step": 12}), ("", 10, {}))
    again = _decide(Ending("error", "", error="ValueError at f", step=12), history, 10)
    assert not again.requeue
    assert "the same error in step 13 as in life 1" in again.reason
    assert _decide(Ending("error", "", error="ValueError at f", step=13), history, 10).requeue
    assert _decide(Ending("error", "", error="OSError at g", step=12), history, 10).requeue


@pytest.mark.parametrize(
    "error", ["OSError at f: No space left on device", "DistNetworkError at g: the client socket has timed out"]
)
def test_troubles_of_the_surroundings_have_the_crash_budget_though_they_repeat(error: str) -> None:
    history = _history(("error", 10, {"error": error}), ("", 10, {}))
    assert _decide(Ending("error", "", error=error), history, 10).requeue


@pytest.mark.parametrize("error", ["KeyError at timeouts.py:3:f: 'x'", "ValueError at f.py:1:g: a temporary shape"])
def test_words_that_only_look_like_such_troubles_do_not_save_a_bug(error: str) -> None:
    history = _history(("error", 10, {"error": error, "step": 12}), ("", 10, {}))
    assert not _decide(Ending("error", "", error=error, step=12), history, 10).requeue


def test_an_error_that_repeats_before_the_first_step_stops_at_once() -> None:
    history = _history(("error", 0, {"error": "ImportError at f: no module"}), ("", 0, {}))
    again = _decide(Ending("error", "", error="ImportError at f: no module"), history, 0)
    assert not again.requeue
    assert "the same error before the first step as in life 1" in again.reason


def test_a_life_that_left_no_start_is_counted_once() -> None:
    """Its ranks did not come to claim the run; its end is not on the ledger yet."""
    history = _history(("killed", 10, {}), ("killed", 10, {}))
    assert not decide(Ending("killed", ""), history, 3, 10, BUDGETS).requeue
    assert decide(Ending("killed", ""), _history(("killed", 10, {})), 2, 10, BUDGETS).requeue


def test_a_checkpoint_before_the_step_of_the_error_does_not_make_it_another_one() -> None:
    history = _history(("error", 0, {"error": "ValueError at f", "step": 11}), ("", 10, {}))
    again = _decide(Ending("error", "", error="ValueError at f", step=11), history, 10)
    assert not again.requeue
    assert "the same error in step 12 as in life 1" in again.reason


def test_the_same_error_counts_with_a_preemption_between() -> None:
    history = _history(("error", 10, {"error": "E", "step": 12}), ("preempted", 10, {}), ("", 10, {}))
    assert not _decide(Ending("error", "", error="E", step=12), history, 10).requeue


def test_runs_of_before_kinds_were_recorded_still_count() -> None:
    old = [event for event in _history(("", 0, {}), ("", 0, {}), ("", 0, {}))]
    old += [{"event": "end", "attempt": attempt, "time": 0.0, "cause": "failed"} for attempt in (1, 2)]
    assert not _decide(Ending("killed", ""), old, 0).requeue


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
