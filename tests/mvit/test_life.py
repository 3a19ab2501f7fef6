"""What a run tells its launcher about how far it came: a step that failed was begun, not finished."""

from pathlib import Path
from typing import Any

import pytest

import mvit
from mvit.life import Phase, Unattended
from tests.mvit.test_training import tiny_config


class _Beats(Unattended):
    def __init__(self) -> None:
        self.told: list[tuple[int, Phase]] = []

    def beat(self, step: int, phase: Phase) -> None:
        self.told.append((step, phase))


class _FailsIn:
    """Raises within one step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def started(self, step: int, engine: Any) -> None:
        """Do nothing."""

    def read(self, step: int, accumulation: int, batch: Any) -> None:
        if step == self._step:
            raise ArithmeticError(f"the fault in step {step}")

    def updated(self, step: int, losses: Any, grad_norm: Any, lr: float, engine: Any) -> None:
        """Do nothing."""


def test_a_run_that_fails_within_a_step_leaves_with_the_step_before_it(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, train={"save_every": 2}, data={"validation": None})
    for failing in (4, 3):  # the second life goes on after step 2 and fails in its very first step
        beats = _Beats()
        with pytest.raises(ArithmeticError, match=f"the fault in step {failing}"):
            mvit.train(config, show_progress=False, observer=_FailsIn(failing), life=beats)
        assert beats.told[-2:] == [(failing, "compute"), (failing - 1, "end")]
