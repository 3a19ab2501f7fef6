"""The save interval is the published optimum of measured costs, within its limits, and explains itself."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mvit
from mvit.checkpoint import list_steps, publications, read_manifest
from mvit.ledger import account
from mvit.life import Unattended
from mvit.save_interval import CAP_S, Measured, Meter, SaveSchedule, Setting, daly, derive, young
from tests.mvit.simulated_run import Simulation
from tests.mvit.test_training import records, tiny_config

LARGE = Setting(num_nodes=26, node_mttf_h=1000, rank_bytes=3_000_000_000, asynchronous=True)


# --- the optimum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mttf_min", "published_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_optimum_is_daly_s(mttf_min: float, published_min: float) -> None:
    """The captions of his figures 3 to 5, for saves of 5 minutes."""
    assert daly(5, mttf_min) == pytest.approx(published_min, rel=0.006)


def wall_time(interval: float, save: float, mttf: float, restart: float) -> float:
    """Return the expected wall time of a unit of work under Poisson failures, as Daly derives it."""
    return mttf * math.exp(restart / mttf) * (math.exp((interval + save) / mttf) - 1) / interval


@given(save=st.floats(0.01, 100), mttf=st.floats(200, 1e7), factor=st.floats(0.2, 5), restart=st.floats(0, 600))
def test_no_other_interval_costs_less(save: float, mttf: float, factor: float, restart: float) -> None:
    best = wall_time(daly(save, mttf), save, mttf, restart)
    assert best <= wall_time(factor * daly(save, mttf), save, mttf, restart) * 1.002


def test_for_cheap_saves_both_formulae_agree() -> None:
    assert daly(0.88, 38.4 * 3600) == pytest.approx(young(0.88, 38.4 * 3600), rel=0.002)
    assert young(0.88, 38.4 * 3600) == pytest.approx(math.sqrt(2 * 0.88 * 38.4 * 3600))
    assert daly(100, 40) == 40, "saves that take longer than the time between failures"


def test_a_simulated_run_is_most_productive_at_the_derived_interval() -> None:
    """Failures come at random on a simulated clock; the ledger tells the goodput of each interval."""
    mttf_s, stall_s = 4000.0, 20.0
    setting = Setting(num_nodes=2, node_mttf_h=2 * mttf_s / 3600, rank_bytes=0, asynchronous=True)
    derived = derive(Measured(step_s=2.0, stall_s=stall_s, publish_s=stall_s), setting).steps
    assert derived * 2 == pytest.approx(math.sqrt(2 * stall_s * mttf_s), rel=0.05)

    def goodput(save_every: int) -> float:
        run, lots = Simulation(save_every=save_every, stall_s=stall_s, queue_s=0, report_every=10**9), random.Random(1)
        run.submit()
        for _ in range(150):
            left = lots.expovariate(1 / mttf_s) - run.start_up_s
            cycles, rest = divmod(max(0.0, left), save_every * run.step_s + stall_s)
            run.live(int(cycles) * save_every + min(save_every - 1, int(rest / run.step_s)))
            run.end("killed", requeued=True)
        return account(run.events, run.clock).ettr or 0.0

    best = goodput(derived)
    assert best > goodput(derived // 4) + 0.02
    assert best > goodput(derived * 4) + 0.02
    assert best > goodput(derived // 2)
    assert best > goodput(derived * 2)


# --- what is derived ------------------------------------------------------------------------------------------


def test_the_arithmetic_is_shown() -> None:
    found = derive(Measured(step_s=1.2, stall_s=0.88, publish_s=10.4), LARGE)
    assert found.steps == 411
    assert found.explanation == (
        "save every 411 steps (8.22 min): sqrt(2 x 0.88 s stall x 38.5 h between failures (prior: 1000 h per node / "
        "26 nodes)) = 8.22 min; 1.2 s a step"
    )


def test_before_a_save_is_measured_its_cost_follows_from_the_bytes() -> None:
    found = derive(Measured(step_s=1.0), LARGE)
    assert "0.75 s stall (a guess: 3 GB per rank x 0.25 s)" in found.explanation
    waited = derive(Measured(step_s=1.0), Setting(26, 1000, 3_000_000_000, asynchronous=False))
    assert "9 s stall (a guess: 3 GB per rank x 3 s)" in waited.explanation
    assert waited.steps > found.steps


def test_three_failures_of_the_run_replace_what_others_published() -> None:
    two, three = (derive(Measured(1.0, 0.5, 5.0, failures=n, mttf_h=2.0), LARGE) for n in (2, 3))
    assert "prior: 1000 h per node / 26 nodes" in two.explanation
    assert "2 h between failures (the mean of 3)" in three.explanation
    assert three.steps == round(daly(0.5, 7200)) < two.steps


def test_limits_hold_and_are_named() -> None:
    one = Setting(1, 1000, 10**9, asynchronous=True)
    capped = derive(Measured(0.5, 0.88, 10.0), one)
    assert capped.steps * 0.5 == CAP_S
    assert "= 41.9 min, but at most 30 min, because a preemption may come without notice" in capped.explanation
    dear = derive(Measured(0.5, 60.0, 60.0), one)
    assert dear.steps * 0.5 == 6000, "half an hour would spend 3 % on saves"
    slow = derive(Measured(0.7, 0.01, 300.0), LARGE)
    assert slow.steps * 0.7 >= 600
    assert "raised to 2 x the 5 min from begin to publish" in slow.explanation
    huge_steps = derive(Measured(4000.0, 0.01, 1.0), LARGE)
    assert (huge_steps.steps, "raised to one step" in huge_steps.explanation) == (1, True)
    often = derive(Measured(0.1, 100.0, 100.0, failures=9, mttf_h=0.1), LARGE)
    assert "with Daly's correction" in often.explanation


@given(
    step_s=st.floats(1e-3, 1e4),
    stall_s=st.none() | st.floats(0, 1e4),
    publish_s=st.none() | st.floats(0, 1e4),
    failures=st.integers(0, 9),
    mttf_h=st.none() | st.floats(1e-4, 1e5),
    rank_bytes=st.integers(0, 10**12),
)
def test_whatever_is_measured_the_limits_hold(rank_bytes: int, **figures: Any) -> None:
    measured = Measured(**figures)
    found = derive(measured, Setting(4, 1000, rank_bytes, asynchronous=True))
    publish_s = 3 * rank_bytes / 1e9 if measured.publish_s is None else measured.publish_s
    assert measured.step_s is not None
    assert found.steps >= 1
    assert found.steps * measured.step_s >= 2 * publish_s * (1 - 1e-9)


# --- when a save is due ---------------------------------------------------------------------------------------


def due_steps(schedule: SaveSchedule, steps: range) -> list[int]:
    found = []
    for step in steps:
        if schedule.due(step):
            schedule.saved(step)
            found.append(step)
    return found


def test_a_given_interval_is_kept_at_its_multiples() -> None:
    schedule = SaveSchedule(10, keep_every=25, first_step=3, setting=LARGE)
    assert due_steps(schedule, range(4, 52)) == [10, 20, 25, 30, 40, 50]
    assert not schedule.derives
    assert not schedule.learn(Measured(1.0)), "nothing to derive"


def test_a_derived_interval_counts_from_the_last_save_whatever_it_was_for() -> None:
    setting = Setting(1, 1e-3, 0, asynchronous=True)
    schedule = SaveSchedule(None, keep_every=25, first_step=3, setting=setting)
    assert due_steps(schedule, range(4, 20)) == [], "nothing is measured yet"
    assert schedule.learn(Measured(1.0, stall_s=14.0, publish_s=1.0))
    assert schedule.steps == 4, schedule.explanation
    assert due_steps(schedule, range(20, 34)) == [20, 24, 25, 29, 33]
    schedule.saved(34)  # a new best
    assert due_steps(schedule, range(35, 40)) == [38]


def test_the_first_save_of_a_run_is_early_and_measured_before_the_interval_counts() -> None:
    schedule = SaveSchedule(None, keep_every=0, first_step=0, setting=LARGE)
    assert not schedule.due(4)
    assert schedule.learn(Measured(step_s=1.0))
    assert schedule.steps is not None
    assert schedule.steps > 100
    assert not schedule.due(5)
    assert schedule.due(5, early=True)
    schedule.saved(5)
    assert not schedule.due(6, early=True)
    assert schedule.due(5 + schedule.steps)


def test_a_life_that_knows_what_a_save_costs_makes_no_early_one() -> None:
    schedule = SaveSchedule(None, keep_every=0, first_step=20, setting=LARGE)
    assert schedule.learn(Measured(step_s=1.0, stall_s=1.0, publish_s=1.0))
    assert not schedule.due(21, early=True)
    given = SaveSchedule(10, keep_every=0, first_step=0, setting=LARGE)
    assert not given.due(5, early=True)
    unknown = SaveSchedule(None, keep_every=0, first_step=20, setting=LARGE)
    assert unknown.learn(Measured(step_s=1.0)), "an earlier life died before it saved"
    assert unknown.due(21, early=True)


def test_small_changes_leave_the_interval_alone() -> None:
    schedule = SaveSchedule(None, keep_every=0, first_step=0, setting=LARGE)
    assert schedule.learn(Measured(1.0, 1.0, 1.0))
    before = (schedule.steps, schedule.explanation)
    assert not schedule.learn(Measured(1.15, 1.0, 1.0))
    assert (schedule.steps, schedule.explanation) == before
    assert schedule.learn(Measured(2.0, 1.0, 1.0))
    assert schedule.explanation != before[1]


def test_a_life_starts_from_what_earlier_lives_measured() -> None:
    run = Simulation()
    run.submit()
    run.live(120)
    run.end("signalled", requeued=True)
    meter = Meter(run.account().figures())
    assert meter.measured() == Measured(2.0, 5.0, 5.0, 0, None)
    for step_s in (1.0, 9.0, 1.1):  # one slow window changes nothing
        meter.stepped(step_s)
    meter.saved(0.5, 3.0)
    assert meter.measured() == Measured(1.1, 0.5, 3.0, 0, None)


# --- a whole run ----------------------------------------------------------------------------------------------


class _Productive(Unattended):
    def goodput(self) -> dict[str, float]:
        return {"ettr": 0.9, "lost_gpu_hours": 1.5, "failures": 0.0}


@pytest.mark.parametrize(("log_every", "limit_s", "first"), [(5, 1e9, 5), (1000, 0.0, 2)], ids=["log point", "clock"])
def test_a_new_run_has_a_checkpoint_soon(
    train: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
    limit_s: float,
    first: int,
) -> None:
    monkeypatch.setattr("mvit.save_timing.FIRST_SAVE_S", limit_s)
    sections: dict[str, Any] = {"schedule": {"epochs": 0.4}, "data": {"validation": None}}
    assert train(train={"save_every": None, "log_every": log_every}, **sections).step == 9
    assert [line["step"] for line in publications(tmp_path / "run")] == [first, 9]


def test_a_run_with_derived_saves_ends_with_the_same_weights(
    train: Callable[..., Any], digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it saves is no part of what it computes: stopped, resumed, and compared with saves at given steps."""
    short: dict[str, Any] = {"schedule": {"epochs": 0.54}, "data": {"validation": None}}
    derived = {"save_every": None, "node_mttf_h": 1e-5, "keep_last": 3}
    train(stop_after=6, train=derived, **short)
    assert "save every" in caplog.text
    assert "h between failures (prior: 1e-05 h per node / 1 node)" in caplog.text
    run_dir = tmp_path / "run"
    assert list_steps(run_dir)[-1] == 7
    assert len(publications(run_dir)) > 1, "it saved at the stop alone"
    assert train(train=derived, **short).step == 12
    intervals = [record["save_interval_steps"] for record in records(run_dir)]
    assert len(intervals) == 12
    assert all(interval >= 1 for interval in intervals)
    given = tiny_config(digits, tmp_path, "given", train={"save_every": 5}, **short)
    mvit.train(given, show_progress=False, life=_Productive())
    assert {record.get("ettr") for record in records(given.run_dir)} == {0.9, None}, "once a minute"
    events = EventAccumulator(str(given.run_dir / "tensorboard"))
    events.Reload()
    assert {"goodput/ettr", "goodput/lost_gpu_hours"} <= set(events.Tags()["scalars"])
    finals = [read_manifest(tmp_path / name / "checkpoints" / "step_00000012") for name in ("run", "given")]
    hashes = [[file["sha256"] for file in manifest.files] for manifest in finals]
    assert hashes[0] == hashes[1]
    assert finals[0].state["config"]["train"]["save_every"] is None, "the saved recipe says so, too"
