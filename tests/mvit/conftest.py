"""What the tests of whole training runs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mvit
from tests.mvit.test_training import tiny_config


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that trains the tiny run in this process."""

    def run(stop_after: int | None = None, **sections: Any) -> mvit.TrainResult:
        calls = 0

        def stop() -> bool:
            nonlocal calls
            calls += 1
            return stop_after is not None and calls >= stop_after

        return mvit.train(tiny_config(digits, tmp_path, **sections), stop_requested=stop, show_progress=False)

    return run
