"""When silence is a hang: by the step time, by the phase, and never because something long is going on."""

from launcher.heartbeat import Beat
from launcher.watchdog import LEAST_LIMIT_S, RESERVE_S, Watchdog

START = 1000.0


def _stepping(watchdog: Watchdog, num_steps: int, step_s: float, first: int = 1) -> float:
    """Let a rank take steps, looked at 4 times a second as the guard does; returns when the last one began."""
    looked = START
    for number in range(num_steps):
        began = START + number * step_s
        while looked < began + step_s:
            beat = Beat(first + number, "compute", began)
            assert watchdog.look(beat, START, max(looked, began)) is None
            looked += 0.25
    return START + (num_steps - 1) * step_s


def test_a_rank_that_steps_quickly_may_be_silent_for_two_minutes_less_the_time_to_end_it() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 50, 1.0)
    beat, limit = Beat(50, "compute", last), LEAST_LIMIT_S - RESERVE_S
    assert watchdog.look(beat, START, last + limit - 1) is None
    stall = watchdog.look(beat, START, last + limit + 1)
    assert stall is not None
    assert (stall.step, stall.phase, stall.age_s, stall.limit_s) == (50, "compute", limit + 1, limit)


def test_slow_steps_are_given_twice_their_time() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 20, 100.0)
    assert watchdog.p99_s == 100.0
    assert watchdog.look(Beat(20, "compute", last), START, last + 184) is None
    assert watchdog.look(Beat(20, "compute", last), START, last + 186) is not None


def test_one_slow_step_in_a_thousand_does_not_move_the_limit() -> None:
    watchdog = Watchdog(None, 1800)
    for step in range(1, 1001):
        watchdog.look(Beat(step, "compute", START + step + (500 if step > 500 else 0)), START, START + step)
    assert watchdog.p99_s == 1.0


def test_a_limit_that_was_set_holds_whatever_the_steps_took() -> None:
    watchdog = Watchdog(20, 1800)
    last = _stepping(watchdog, 5, 1.0)
    assert watchdog.look(Beat(5, "data", last), START, last + 19) is None
    assert watchdog.look(Beat(5, "data", last), START, last + 21) is not None


def test_starting_saving_and_leaving_may_take_longer() -> None:
    for phase in ("start", "save", "end"):
        watchdog = Watchdog(20, 300)
        last = _stepping(watchdog, 5, 1.0)
        assert watchdog.look(Beat(5, phase, last), START, last + 299) is None
        assert watchdog.look(Beat(5, phase, last), START, last + 301) is not None


def test_the_first_step_compiles_and_counts_as_the_start() -> None:
    watchdog = Watchdog(20, 300)
    assert watchdog.look(Beat(7, "compute", START), START, START + 299) is None
    assert watchdog.look(Beat(7, "compute", START), START, START + 301) is not None


def test_a_rank_that_never_said_a_word_hangs_after_the_start_limit() -> None:
    watchdog = Watchdog(20, 300)
    assert watchdog.look(None, START, START + 299) is None
    assert watchdog.look(None, START, START + 301) is not None


def test_an_evaluation_between_two_steps_is_no_step_time() -> None:
    watchdog = Watchdog(None, 1800)
    last = _stepping(watchdog, 10, 1.0)
    assert watchdog.look(Beat(10, "evaluate", last + 80), START, last + 81) is None
    assert watchdog.look(Beat(11, "data", last + 90), START, last + 90) is None
    assert watchdog.p99_s == 1.0
