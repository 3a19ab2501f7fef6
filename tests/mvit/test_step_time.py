"""A run says where the time of its steps goes: delays are found in the part, and on the rank, that they were put in."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mvit
from mvit.config import parse_config
from mvit.engine import Engine
from mvit.step_time import PARTS, slowest
from mvit.tasks.image_classification import ImageClassification
from tests.mvit.test_training import records, tiny_config
from tests.ranks import run_distributed

DELAY_S = 1.0
DELAYED = ("data", "forward", "backward", "optimizer")


def _late(function: Callable[..., Any], is_due: Callable[[], bool]) -> Callable[..., Any]:
    def late(*args: Any, **kwargs: Any) -> Any:
        if is_due():
            time.sleep(DELAY_S)
        return function(*args, **kwargs)

    return late


def test_a_delay_is_found_in_its_part_and_nowhere_else(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(digits, tmp_path, train={"evaluate_every": 0, "micro_batch_size": 64})
    step = 0

    def turn(part: str) -> Callable[[], bool]:
        return lambda: step % (len(DELAYED) + 1) == DELAYED.index(part)

    def stop() -> bool:  # asked after every step
        nonlocal step
        step += 1
        return step >= 3 * (len(DELAYED) + 1) + 1

    monkeypatch.setattr(ImageClassification, "collate", _late(ImageClassification.collate, turn("data")))
    monkeypatch.setattr(Engine, "__call__", _late(Engine.__call__, turn("forward")))
    monkeypatch.setattr(Engine, "backward", _late(Engine.backward, turn("backward")))
    monkeypatch.setattr(Engine, "update", _late(Engine.update, turn("optimizer")))
    mvit.train(config, stop_requested=stop, show_progress=False)
    found = records(Path(config.run_dir))[1:16]  # the first step also warms up
    assert len(found) == 15
    for part in PARTS:
        spent = [(record["step"] - 1, record[f"{part}_seconds"]) for record in found]
        usual = statistics.median(seconds for done, seconds in spent if not _is_turn(done, part))
        for other in DELAYED:
            late = statistics.median(seconds for done, seconds in spent if _is_turn(done, other))
            assert late - usual == pytest.approx(DELAY_S if other == part else 0, abs=0.05 * DELAY_S), (part, other)
    for record in found:
        assert sum(record[f"{part}_seconds"] for part in PARTS) == pytest.approx(record["step_seconds"])


def _is_turn(done: int, part: str) -> bool:
    return part in DELAYED and done % (len(DELAYED) + 1) == DELAYED.index(part)


def _train_with_a_late_rank(values: dict[str, Any]) -> None:
    from mvit import distributed

    late_rank, done = distributed.start().rank == 1, 0

    def stop() -> bool:  # asked after every step
        nonlocal done
        done += 1
        return done >= 9

    Engine.__call__ = _late(Engine.__call__, lambda: late_rank and done % 2 == 1)  # in a process of its own
    mvit.train(parse_config(values), stop_requested=stop, show_progress=False)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_slowest_rank_is_named_and_the_others_wait_for_it_in_communication(
    digits: Path, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(
        digits,
        tmp_path,
        train={"evaluate_every": 0, "micro_batch_size": 8, "global_batch_size": 16},
        zero={"stage": stage},
    )
    run_distributed(_train_with_a_late_rank, 2, config.model_dump(mode="json"))
    found = records(Path(config.run_dir))[1:9]
    late, on_time = ([record for record in found if record["step"] % 2 == parity] for parity in (0, 1))
    for record in late:
        assert record["slowest_rank"] == 1
        assert record["slowest_excess"] > 0
    waited = [statistics.median(record["communication_seconds"] for record in some) for some in (late, on_time)]
    assert waited[0] - waited[1] == pytest.approx(DELAY_S, rel=0.3), "rank 0 waits for rank 1 there"


def test_the_excess_is_measured_against_the_median() -> None:
    assert slowest([1.0, 1.0, 4.0]) == {"slowest_rank": 2.0, "slowest_excess": 3.0}
    assert slowest([2.0, 4.0]) == {"slowest_rank": 1.0, "slowest_excess": pytest.approx(1 / 3)}
