"""The ledger's figures are the closed-form ones of runs played on a simulated clock, and its parts add up."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvit.ledger import FAILURES, Account, account
from tests.mvit.simulated_run import Event, Simulation


def parts_of(found: Account) -> Iterator[tuple[float, float]]:
    """Yield each whole with the sum of its parts."""
    for life in found.lives:
        inside = life.start_s + life.productive_s + life.lost_s + life.stall_s + life.evaluate_s
        yield life.duration_s, inside + life.tail_s + life.other_s
        assert life.restore_s <= life.start_s
        assert life.data_wait_s <= life.productive_s + life.lost_s
        times = [value for name, value in vars(life).items() if name.endswith("_s")]
        assert min(times) >= 0, life
        assert life.lost_steps >= 0
    yield found.wall_s, found.run_s + found.queue_s + found.down_s
    running = found.start_s + found.productive_s + found.lost_s + found.stall_s + found.evaluate_s
    yield found.run_s, running + found.tail_s + found.other_s
    waiting = sum(life.queue_s + life.queue_after_s + life.down_s for life in found.lives)
    yield found.queue_s + found.down_s, waiting


# --- closed-form values ---------------------------------------------------------------------------------------


def test_an_undisturbed_run_is_productive_but_for_queue_start_and_saves() -> None:
    run = Simulation()
    run.submit()
    run.live(200)
    run.end("finished")
    found = run.account()
    assert found.productive_s == pytest.approx(400)
    assert found.wall_s == pytest.approx(60 + 120 + 400 + 4 * 5)
    assert found.ettr == pytest.approx(400 / 600)
    assert found.ettr_running == pytest.approx(400 / 540)
    assert found.checkpoint_overhead == pytest.approx(20 / 540)
    assert (found.failures, found.mttf_s, found.ends) == (0, None, {"finished": 1})
    assert found.gpu_hours == pytest.approx(16 * 540 / 3600)
    assert (found.lost_gpu_hours, found.lost_hours) == (0, 0)
    assert (found.step, found.step_s) == (200, pytest.approx(2.0))
    assert (found.save_stall_s, found.save_s) == (5, 5)
    (life,) = found.lives
    assert (life.queue_s, life.start_s, life.restore_s) == pytest.approx((60, 120, 30))
    assert (life.first_step, life.last_step, life.lost_steps, life.hosts) == (1, 200, 0, ("n0", "n1"))


def test_regular_failures_give_the_ratio_that_can_be_computed_by_hand() -> None:
    """Every life trains 120 steps and dies: two saves of 50 steps are kept, 20 steps are done again."""
    run, lives = Simulation(), 6
    run.submit()
    for _ in range(lives):
        run.live(120)
        run.end("killed", requeued=True, dying_s=30)
    found = run.account()
    life_s = 120 + 120 * 2 + 2 * 5 + 30
    assert found.ettr == pytest.approx(100 * 2 / (60 + life_s))
    assert found.ettr_running == pytest.approx(100 * 2 / life_s)
    assert found.mttf_s == pytest.approx(life_s)
    assert found.step == lives * 100
    assert [life.lost_steps for life in found.lives] == [20] * lives
    assert found.lost_s == pytest.approx(lives * 20 * 2)
    assert found.lost_gpu_hours == pytest.approx(16 * (lives * (40 + 30) + (lives - 1) * 120) / 3600)
    assert found.lost_hours == pytest.approx((lives * (40 + 30) + (lives - 1) * (120 + 60)) / 3600)
    assert found.checkpoint_overhead == pytest.approx(10 / life_s)


def test_a_signalled_stop_loses_no_step_and_is_no_failure() -> None:
    run = Simulation()
    run.submit()
    run.live(120)
    run.end("signalled", requeued=True)
    run.live(80)
    run.end("finished")
    found = run.account()
    assert (found.step, found.lost_s, found.productive_s) == (200, 0, pytest.approx(400))
    assert (found.failures, found.mttf_s, found.interruptions) == (0, None, 1)
    assert found.mtti_s == pytest.approx(found.run_s)
    assert found.lost_gpu_hours == pytest.approx(16 * 120 / 3600), "the second start-up"


def test_steps_done_twice_count_once_however_far_a_run_falls_back() -> None:
    """A life that falls back behind what its forerunner kept takes that from it, and what replaces it counts."""
    run = Simulation()
    run.submit()
    run.live(120)  # 100 kept
    run.end("node", requeued=True)
    run.saved = 50  # the checkpoint of step 100 is damaged
    run.live(60)  # 51 to 110, of which up to 100
    run.end("hung", requeued=True)
    run.live(20)
    found = run.account()
    assert [life.lost_steps for life in found.lives] == [70, 10, 0]
    assert [life.productive_s for life in found.lives] == pytest.approx([100, 100, 40])
    assert found.productive_s == pytest.approx(found.step * 2.0)
    assert found.step == 120


def test_an_attempt_that_got_nowhere_takes_nothing_from_those_before() -> None:
    """It read an older checkpoint and died; the next one found the newest after all."""
    run = Simulation()
    run.submit()
    run.live(100)
    run.end("killed", requeued=True)
    run.saved = 50
    run.live(0)
    run.end("error", requeued=True)
    run.saved = 100
    run.live(10)
    found = run.account()
    assert [life.productive_s for life in found.lives] == pytest.approx([200, 0, 20])
    assert found.lives[1].start_s == pytest.approx(120)
    assert found.lost_s == 0


def test_steps_after_the_last_report_are_lost_too_where_their_number_is_known() -> None:
    run = Simulation()
    run.submit()
    run.live(55)
    run.clock += 20
    run.end("killed")
    assert run.account().lost_s == pytest.approx(5 * 2)
    assert run.account().tail_s == pytest.approx(20)
    run.events[-1]["step"] = 58  # heartbeats tell
    found = run.account()
    assert found.lives[0].lost_steps == 8
    assert found.lost_s == pytest.approx(8 * 2, rel=0.01)
    assert found.tail_s == pytest.approx(14, rel=0.01)


def test_a_step_that_had_only_begun_counts_nowhere() -> None:
    """An end names the last finished step: what came after it belongs to the tail, or to the start of a life."""
    run = Simulation()
    run.submit()
    run.live(55)
    run.end("killed", requeued=True, dying_s=20)
    before = run.account()
    run.events[-1]["step"] = 55  # it died in step 56
    found = run.account()
    assert (found.lives[0].last_step, found.lives[0].lost_steps) == (55, 5)
    assert (found.lost_s, found.tail_s) == (before.lost_s, before.tail_s) == (10, 20)
    run.live(0)
    run.end("killed", dying_s=20)
    run.events[-1]["step"] = 50  # it went on after 50 and died in 51
    second = run.account().lives[1]
    assert (second.first_step, second.lost_steps, second.lost_s) == (None, 0, 0)
    assert second.start_s == pytest.approx(second.duration_s)
    assert run.account().productive_s == found.productive_s


def test_the_first_step_is_training_though_it_ends_the_start() -> None:
    run = Simulation(step_s=30.0)  # compiling, say
    run.submit()
    run.live(10)
    run.end("finished")
    found = run.account()
    assert (found.start_s, found.productive_s, found.other_s) == pytest.approx((120, 300, 0))


# --- waiting --------------------------------------------------------------------------------------------------


def test_a_pause_that_was_asked_for_is_no_wall_time_and_waiting_after_a_failure_is() -> None:
    run = Simulation(queue_s=0)
    run.submit()
    run.live(50)
    run.end("user_stop")
    run.clock += 5000
    run.submit()
    run.live(50)
    run.end("error")
    run.clock += 7000
    run.submit()
    run.live(50)
    found = run.account()
    assert [life.paused_s for life in found.lives] == pytest.approx([0, 5000, 0])
    assert [life.down_s for life in found.lives] == pytest.approx([0, 0, 7000])
    assert found.wall_s == pytest.approx(3 * (120 + 105) + 7000)


def test_queue_time_begins_when_the_run_was_asked_for() -> None:
    run = Simulation(queue_s=100)
    run.submit()
    run.live(50)
    run.end("preempted", requeued=True)
    at_rest = run.clock
    run.live(50)
    assert [life.queue_s for life in run.account().lives] == [100, 100]
    waiting = account(run.events[: next(i for i, e in enumerate(run.events) if e["attempt"] == 2)], at_rest + 40)
    assert waiting.queue_s == pytest.approx(140)
    assert waiting.lives[0].queue_after_s == pytest.approx(40)


def test_a_job_cancelled_after_it_went_back_to_the_queue_waited_until_then() -> None:
    run = Simulation(queue_s=0)
    run.submit()
    run.live(50)
    run.end("killed", requeued=True)
    run.clock += 300
    run.tell("end", cause="stopped", kind="cancelled", requeued=False, checkpoint_step=50)
    run.clock += 900
    found = run.account()
    assert (found.queue_s, found.wall_s) == pytest.approx((300, 300 + 225))
    assert found.ends == {"killed": 1}, "its ranks were killed; what was cancelled is the waiting"
    run.submit()
    run.live(10)
    assert run.account().lives[1].paused_s == pytest.approx(900)


def test_a_life_without_an_end_was_lost_and_its_silence_is_queue() -> None:
    """A node is powered off and Slurm requeues by itself; the next life writes the end of the one before."""
    run = Simulation(queue_s=0)
    run.submit()
    run.live(60)
    run.clock += 400
    for recorded in (True, False):
        events, again = list(run.events), Simulation(**{**vars(run), "events": list(run.events)})
        if recorded:
            again.tell("end", cause="failed", kind="lost", detail="ended without a record", requeued=False)
        again.live(10)
        found = again.account()
        assert found.lives[1].queue_s == pytest.approx(400)
        assert found.lives[0].duration_s == pytest.approx(120 + 120 + 5)
        assert found.lives[0].lost_steps == 10
        assert (found.failures, found.lives[0].kind) == (1, "lost")
        assert events == run.events


def test_a_life_counts_until_now_while_it_runs_and_a_queued_one_waits() -> None:
    run = Simulation()
    run.submit()
    assert account(run.events, run.clock + 30).queue_s == pytest.approx(30)
    run.live(50)
    assert account(run.events, run.clock + 10).tail_s == pytest.approx(10)
    assert account(run.events, run.clock + 10).lives[0].kind is None
    run.end("finished")
    assert account(run.events, run.clock + 1e6).wall_s == pytest.approx(run.account().wall_s), "a run at rest"


# --- what is on the disk of older runs, and what is shown -----------------------------------------------------


def test_files_of_older_versions_are_read() -> None:
    """submit, start and end alone: lives and queue are known, their parts are not."""
    events: list[Event] = [
        {"event": "submit", "attempt": 1, "time": 0.0, "executor": "local", "job_id": "9", "world_size": 2},
        {"event": "start", "attempt": 1, "time": 5.0, "executor": "local", "world_size": 2, "checkpoint_step": 0},
        {"event": "end", "attempt": 1, "time": 65.0, "cause": "failed", "detail": "rank 1", "checkpoint_step": 90},
        {"event": "submit", "attempt": 2, "time": 100.0, "executor": "local", "job_id": "9", "world_size": 2},
        {"event": "start", "attempt": 2, "time": 101.0, "executor": "local", "world_size": 2, "checkpoint_step": 90},
        {"event": "end", "attempt": 2, "time": 161.0, "cause": "finished", "detail": "", "checkpoint_step": 300},
    ]
    found = account(events, 1000.0)
    assert (found.step, found.wall_s, found.run_s, found.other_s) == (300, 161, 120, 120)
    assert (found.queue_s, found.down_s, found.failures) == (6, 35, 1)
    assert [life.kind for life in found.lives] == ["error", "finished"]
    assert found.gpu_hours == pytest.approx(2 * 120 / 3600), "rank-hours: these were CPUs"


def test_what_makes_no_sense_is_passed_over() -> None:
    run = Simulation()
    run.submit()
    run.live(60)
    before = run.account()
    run.events[1:1] = [
        {"event": "start"},
        {"attempt": 1, "time": 5.0},
        {"event": "exclude", "attempt": 1, "time": run.clock, "hosts": ["n0"]},
        {"event": "progress", "attempt": 1, "time": run.clock, "step": None, "train_s": "many"},
        {"event": "news", "attempt": 1, "time": run.clock, "colour": "green"},
    ]
    after = run.account()
    assert (after.productive_s, after.wall_s) == pytest.approx((before.productive_s, before.wall_s))
    assert account([], 0.0).ettr is None
    assert str(account([], 0.0)) == "no life on record"


def test_the_text_is_short_and_the_dict_is_json() -> None:
    run = Simulation()
    run.submit()
    run.live(120)
    run.end("node", requeued=True, dying_s=30)
    run.live(100)
    run.end("finished")
    found = run.account()
    text = str(found)
    assert 4 <= len(text.splitlines()) <= 6, text
    assert "goodput (ETTR) 47.1 % of 14.2 min since the first submission" in text
    assert "2 (1 node, 1 finished); one failure per 12.2 min, one interruption per 12.2 min of running" in text
    assert "0.07 h of wall time, 0.84 of 3.24 GPU-hours" in text
    tree = json.loads(json.dumps(found.to_dict()))
    assert tree["ettr"] == pytest.approx(found.ettr)
    assert tree["lives"][0]["kind"] == "node"
    assert found.figures()["mttf_h"] == pytest.approx(found.run_s / 3600)
    assert all(math.isfinite(value) for value in found.figures().values())


# --- what holds for every run ---------------------------------------------------------------------------------

KINDS = (*FAILURES, "preempted", "signalled", "user_stop", "fenced", "cancelled")
LIFE = st.tuples(
    st.integers(0, 130),
    st.sampled_from(KINDS),
    st.booleans(),
    st.floats(0, 100),
    st.booleans(),
    st.floats(0, 500),
)


def play(lives: Sequence[Any], **sizes: Any) -> Iterator[Simulation]:
    """Yield the run after each of `lives`: steps, kind, requeued, seconds of dying, with a submit?, a pause."""
    run = Simulation(**sizes)
    run.submit()
    for steps, kind, requeued, dying_s, submitted, pause_s in lives:
        run.live(steps)
        run.end(kind, requeued=requeued, dying_s=dying_s)
        yield run
        run.clock += pause_s
        if submitted or not requeued:
            run.submit()


@given(lives=st.lists(LIFE, min_size=1, max_size=6), queue_s=st.floats(0, 100), stall_s=st.floats(0, 10))
@settings(max_examples=40, deadline=None)
def test_parts_add_up_and_more_lives_take_nothing_back(lives: Sequence[Any], queue_s: float, stall_s: float) -> None:
    before = account([], 0.0)
    for run in play(lives, queue_s=queue_s, stall_s=stall_s):
        found = run.account()
        for whole, parts in parts_of(found):
            assert whole == pytest.approx(parts, abs=1e-6)
        assert found.ettr is None or 0 <= found.ettr <= 1 + 1e-9
        assert (found.ettr or 0) <= (found.ettr_running or 0) + 1e-9
        assert found.productive_s == pytest.approx(found.step * run.step_s, abs=1e-6)
        assert found.lost_gpu_hours <= found.gpu_hours + 1e-9
        assert found.lost_hours <= found.wall_s / 3600 + 1e-9
        assert sum(found.ends.values()) == len(found.lives)
        for name in ("wall_s", "run_s", "queue_s", "lost_s", "stall_s", "productive_s", "failures", "lost_gpu_hours"):
            assert getattr(found, name) >= getattr(before, name) - 1e-6, name
        before = found


EVENT = st.fixed_dictionaries(
    {
        "event": st.sampled_from(["submit", "start", "restored", "first_step", "progress", "saved", "end", "?"]),
        "attempt": st.integers(1, 4),
        "time": st.floats(0, 1000),
    },
    optional={
        "step": st.integers(0, 100),
        "seconds": st.floats(0, 1000),
        "train_s": st.floats(0, 1000),
        "stall_s": st.floats(0, 1000),
        "evaluate_s": st.floats(0, 1000),
        "checkpoint_step": st.integers(0, 100),
        "kind": st.sampled_from(KINDS),
        "cause": st.sampled_from(["finished", "stopped", "failed"]),
        "requeued": st.booleans(),
        "ended": st.floats(0, 1000),
        "executor": st.sampled_from(["slurm", "local", "inline"]),
        "gpus": st.integers(0, 8),
    },
)


@given(events=st.lists(EVENT, max_size=25), now=st.floats(0, 2000))
@settings(max_examples=150, deadline=None)
def test_whatever_is_in_the_file_parts_add_up_and_nothing_is_negative(events: list[Event], now: float) -> None:
    """Clocks that are set back, lines that are missing, lives that overlap."""
    found = account(events, now)
    for whole, parts in parts_of(found):
        assert whole == pytest.approx(parts, abs=1e-6)
    assert found.ettr is None or 0 <= found.ettr <= 1 + 1e-9
    assert str(found)
