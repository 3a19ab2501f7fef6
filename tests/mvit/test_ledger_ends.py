"""The ledger of ends that were written later, by somebody else, or before the ranks were done."""

import math

import pytest

from tests.mvit.simulated_run import Simulation


@pytest.mark.parametrize(("kind", "requeued"), [("lost", True), ("preempted", True), ("cancelled", False)])
def test_an_end_that_was_recorded_later_counts_from_when_it_happened(kind: str, requeued: bool) -> None:
    run = Simulation(queue_s=0)
    run.submit()
    run.live(60)
    ended = run.clock + 30
    run.clock += 7200
    run.tell("end", cause="failed", kind=kind, requeued=requeued, checkpoint_step=50, ended=ended)
    if not requeued:
        run.submit()
    run.live(10)
    found = run.account()
    assert found.lives[0].duration_s == pytest.approx(120 + 120 + 5 + 30)
    assert (found.lives[1].queue_s, found.lives[1].paused_s) == pytest.approx((7170, 0) if requeued else (0, 7170))
    assert found.lost_hours == pytest.approx((20 + 120 + (30 if requeued else 0) + (7170 if requeued else 0)) / 3600)


def test_a_save_that_follows_the_record_of_a_cancel_counts() -> None:
    """`mvit cancel` writes its record at once; Slurm lets the ranks go on until KillWait."""
    run = Simulation(queue_s=0)
    run.submit()
    run.live(60)
    run.tell("end", cause="stopped", kind="cancelled", requeued=False, checkpoint_step=50)
    assert run.account().lives[0].lost_steps == 10
    run.clock += 8
    run.tell("saved", step=60, seconds=8.0, stall_s=8.0, bytes=1)
    found = run.account()
    assert (found.step, found.lives[0].lost_steps, found.lost_s) == (60, 0, 0.0)
    assert found.lives[0].duration_s == pytest.approx(120 + 120 + 5 + 8)
    run.clock += 900
    run.submit()
    assert run.account().lives[1].paused_s == pytest.approx(900)


def test_nothing_is_lost_to_less_than_nothing() -> None:
    """Sums of floats differ in their last digits, and -0.00 is no time."""
    run = Simulation(queue_s=1.0, step_s=0.184, save_every=1000, report_every=7)
    run.submit()
    run.live(21)
    run.end("user_stop")
    assert math.copysign(1.0, run.account().lost_hours) == 1.0
    assert "lost: 0.00 h of wall time, 0.00 of" in str(run.account())
