"""When silence is a hang: by the step time, by the phase, and never because something long is going on."""

from typing import Any

from launcher.heartbeat import Beat
from launcher.watchdog import LEAST_LIMIT_S, RESERVE_S, AwakeClock, Watchdog


def _stepping(watchdog: Watchdog, num_steps: int, step_s: float) -> float:
    """Let a rank take steps, looked at 4 times a second as the guard does; returns when the last one began."""
    looked = 0.0
    for number in range(num_steps):
        began = number * step_s
        while looked < began + step_s:
            assert watchdog.look(Beat(1 + number, "compute", began), looked) is None
            looked += 0.25
    return (num_steps - 1) * step_s


def test_a_rank_that_steps_quickly_may_be_silent_for_two_minutes_less_the_time_to_end_it() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 50, 1.0)
    beat, limit = Beat(50, "compute", last), LEAST_LIMIT_S - RESERVE_S
    assert watchdog.look(beat, last + limit - 1) is None
    stall = watchdog.look(beat, last + limit + 1)
    assert stall is not None
    assert (stall.step, stall.phase, stall.age_s, stall.limit_s) == (50, "compute", limit + 1, limit)


def test_where_many_ranks_take_long_to_be_ended_the_limit_is_shorter_by_that() -> None:
    watchdog = Watchdog(None, 1800, reserve_s=35)
    last = _stepping(watchdog, 50, 1.0)
    assert watchdog.look(Beat(50, "compute", last), last + 84) is None
    assert watchdog.look(Beat(50, "compute", last), last + 86) is not None


def test_however_many_ranks_there_are_no_healthy_step_hangs() -> None:
    quick, slow = Watchdog(None, 1800, reserve_s=200), Watchdog(None, 1800, reserve_s=200)
    _stepping(quick, 50, 1.0)
    _stepping(slow, 50, 100.0)
    assert (quick.limit_s, slow.limit_s) == (60, 150)


def test_slow_steps_are_given_twice_their_time() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 20, 100.0)
    assert watchdog.p99_s == 100.0
    assert watchdog.look(Beat(20, "compute", last), last + 184) is None
    assert watchdog.look(Beat(20, "compute", last), last + 186) is not None


def test_one_slow_step_in_a_thousand_does_not_move_the_limit() -> None:
    watchdog = Watchdog(None, 1800)
    for step in range(1, 1001):
        watchdog.look(Beat(step, "compute", step), step + (500.0 if step > 500 else 0.0))
    assert watchdog.p99_s == 1.0


def test_a_limit_that_was_set_holds_whatever_the_steps_took() -> None:
    watchdog = Watchdog(20, 1800)
    last = _stepping(watchdog, 5, 1.0)
    assert watchdog.look(Beat(5, "data", last), last + 1) is None
    assert watchdog.look(Beat(5, "data", last), last + 20) is None
    assert watchdog.look(Beat(5, "data", last), last + 22) is not None


def _limit_of(phase: Any, watchdog: Watchdog, begins: float) -> float:
    """Return after how many seconds in a phase a rank hangs."""
    beat, now = Beat(5, phase, begins), begins
    while watchdog.look(beat, now) is None:
        now += 1
    return now - begins


def test_starting_saving_and_leaving_may_take_longer() -> None:
    for phase in ("start", "save", "end"):
        watchdog = Watchdog(20, 300)
        assert _limit_of(phase, watchdog, 1 + _stepping(watchdog, 5, 1.0)) == 301


def test_the_first_evaluation_compiles_and_starts_workers_and_may_take_longer() -> None:
    watchdog = Watchdog(20, 300)
    begins = 1 + _stepping(watchdog, 5, 1.0)
    for batch in range(3):  # one beat for each batch
        assert watchdog.look(Beat(5, "evaluate", begins + batch), begins + batch) is None
    assert _limit_of("evaluate", watchdog, begins + 4) == 301
    watchdog.look(Beat(6, "compute", 999.0), 999.0)
    assert _limit_of("evaluate", watchdog, 1000.0) == 21, "all is warm the second time"


def test_an_evaluation_that_a_save_follows_was_the_first_one() -> None:
    watchdog = Watchdog(20, 300)
    begins = 1 + _stepping(watchdog, 5, 1.0)
    for seconds, phase in enumerate(("evaluate", "save", "data")):
        watchdog.look(Beat(5, phase, begins + seconds), begins + seconds)  # pyright: ignore[reportArgumentType]
    assert _limit_of("evaluate", watchdog, begins + 10) == 21


def test_the_first_step_compiles_and_counts_as_the_start() -> None:
    watchdog = Watchdog(20, 300)
    assert watchdog.look(Beat(7, "compute", 0.0), 0.0) is None
    assert watchdog.look(Beat(7, "compute", 0.0), 299) is None
    assert watchdog.look(Beat(7, "compute", 0.0), 301) is not None


def test_a_rank_that_never_said_a_word_hangs_after_the_start_limit() -> None:
    watchdog = Watchdog(20, 300)
    assert watchdog.look(None, 299) is None
    stall = watchdog.look(None, 301)
    assert stall is not None
    assert (stall.step, stall.phase) == (0, "start")


def test_an_evaluation_between_two_steps_is_no_step_time() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 10, 1.0)
    assert watchdog.look(Beat(10, "evaluate", last + 80), last + 81) is None
    assert watchdog.look(Beat(11, "data", last + 90), last + 90) is None
    assert watchdog.p99_s == 1.0


def test_time_in_which_the_job_was_suspended_does_not_count() -> None:
    clock = AwakeClock(100.0)
    assert [clock.read(now) for now in (100.25, 100.5, 4100.5, 4100.75)] == [0.25, 0.5, 1.5, 1.75]
