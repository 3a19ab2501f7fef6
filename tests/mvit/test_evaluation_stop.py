"""An evaluation that one rank is told to stop ends on all of them at the same batch, without figures."""

import itertools
import os
from pathlib import Path
from typing import Any

import mvit
from mvit.config import parse_config
from mvit.life import Stopped
from tests.mvit.synthetic_checkpoint import write_checkpoint
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed


def _evaluate_thrice(config: dict[str, Any]) -> list[tuple[str, int]]:
    return [_evaluate(config, stop_at) for stop_at in (None, 4, 12)]


def _evaluate(config: dict[str, Any], stop_at: int | None) -> tuple[str, int]:
    """Return how it ended and the number of times that this rank was asked; rank 1 is told to stop at its `stop_at`."""
    asked = itertools.count(1)
    told = stop_at is not None and os.environ["RANK"] == "1"

    def stop() -> bool:
        number = next(asked)
        return told and number >= (stop_at or 0)

    run = parse_config(config)
    try:
        figures = mvit.evaluate(run, run.run_dir, show_progress=False, stop_requested=stop)
        ended = f"{figures['samples']:.0f} samples"
    except Stopped as stopped:
        ended = str(stopped)
    return ended, next(asked) - 1


def test_a_stop_of_one_rank_ends_all_at_the_same_batch(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, train={"evaluation_batch_size": 16})
    write_checkpoint(config)
    stopped = ("the evaluation was asked to stop before batch 5 of 12", 5)
    whole = ("355 samples", 12)  # also where the request comes with the last batch
    found = run_distributed(_evaluate_thrice, 2, config.model_dump(mode="json"))
    assert found == [[whole, stopped, whole]] * 2
