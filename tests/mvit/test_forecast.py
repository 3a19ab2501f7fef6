"""A run that begins says once how far off the plan was; others say nothing."""

import logging

import pytest
import torch

from mvit import forecast
from mvit.distributed import RankInfo
from mvit.forecast import Forecast
from tests.mvit.test_planner_memory import small_config

MAIN = RankInfo(0, 0, 1, torch.device("cpu"))
RATES = {"step_seconds": 2.0, "data_wait": 0.25}
CONFIG = small_config(0, train={"global_batch_size": 8})


def test_memory_is_compared_once_at_the_second_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forecast, "LEAST_PARAMETERS", 0)
    seen = Forecast(CONFIG, MAIN, begins=True)
    held = torch.ones(64 * 2**20 // 4)  # training's 64 MiB
    with caplog.at_level(logging.INFO, logger="mvit"):
        seen.tell(RATES)
        assert caplog.text == ""
        seen.tell(RATES)
        seen.tell(RATES)
    assert len(caplog.records) == 1
    assert "forecast (mvit plan): memory " in caplog.text
    assert "foreseen" in caplog.text
    assert "step" not in caplog.text  # no such figure of a CPU
    assert len(held)


@pytest.mark.parametrize(
    ("ranks", "begins", "least"),
    [(MAIN, False, 0), (RankInfo(1, 1, 2, torch.device("cpu")), True, 0), (MAIN, True, 16_000_000)],
    ids=["a resumed run", "another rank", "a small model"],
)
def test_nothing_is_said_by(
    ranks: RankInfo, begins: bool, least: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forecast, "LEAST_PARAMETERS", least)
    seen = Forecast(CONFIG, ranks, begins=begins)
    with caplog.at_level(logging.INFO, logger="mvit"):
        seen.tell(RATES)
        seen.tell(RATES)
    assert caplog.text == ""


def test_a_plan_that_fails_is_told_and_stops_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forecast, "LEAST_PARAMETERS", 0)
    with caplog.at_level(logging.WARNING, logger="mvit"):
        Forecast(CONFIG, RankInfo(0, 0, 3, torch.device("cpu")), begins=True)  # 8 samples for 3 ranks
    assert "no forecast of memory and time: ConfigError: train.global_batch_size = 8" in caplog.text


def test_the_high_water_mark_is_what_was_resident_at_most() -> None:
    before = forecast.high_water_bytes()
    held = bytearray(256 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    after = forecast.high_water_bytes()
    del held
    assert after >= before
    assert forecast.high_water_bytes() > after - 16 * 2**20  # the kernel counts in batches
