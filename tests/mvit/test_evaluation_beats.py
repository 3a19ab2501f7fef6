"""An evaluation says that it lives before everything that may take long, so that no two of them count as one."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mvit
import mvit.evaluation
from mvit.engine import Engine
from mvit.life import Phase, Unattended
from mvit.tasks.image_classification import TopK
from tests.mvit.test_training import tiny_config


class _Beats(Unattended):
    def __init__(self, told: list[str]) -> None:
        self._told = told

    def beat(self, step: int, phase: Phase) -> None:
        self._told.append(f"beat {phase}")


def _noted(told: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        told.append(name)
        result = function(*arguments)
        told.append(f"end of {name}")
        return result

    return noted


def test_reductions_and_the_change_to_the_averaged_weights_count_from_their_own_beginning(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(TopK, "update", _noted(told, "batch", TopK.update))
    monkeypatch.setattr(TopK, "compute", _noted(told, "gather", TopK.compute))
    monkeypatch.setattr(Engine, "_swap_ema", _noted(told, "swap", Engine._swap_ema))
    monkeypatch.setattr("mvit.evaluation.sum_over_ranks", _noted(told, "count", mvit.evaluation.sum_over_ranks))
    config = tiny_config(digits, tmp_path, schedule={"epochs": 0.1, "warmup_epochs": 0.0}, train={"save_every": 1000})
    mvit.train(config, show_progress=False, life=_Beats(told))
    assert [told.count(name) for name in ("gather", "swap")] == [2, 2], "raw and averaged weights"
    for before, now in pairwise(told):
        if now in ("batch", "count", "gather", "swap"):
            second = (before, now) == ("end of count", "count")  # finds all ranks there
            assert second or before == "beat evaluate", (before, now)
        if before == "end of gather":
            assert now == "beat evaluate"
