"""`mvit bench detection` measures what it says, at any size, and the metric it times is pycocotools' own."""

import json

import pytest
import torch

from launcher.cli import main
from mvit.benchmark_detection import bench_attention, bench_metric, synthetic_set


def test_both_parts_come_as_json_with_ratios_to_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    words = ["--size", "64", "96", "--attention", "full", "hwin", "--images", "20", "--threads", threads, "--json"]
    assert main(["bench", "detection", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = printed["attention"]
    assert [(row["kind"], row["attention"]) for row in rows] == [
        ("forward", "full"),
        ("forward", "hwin"),
        ("train", "full"),
        ("train", "hwin"),
    ]
    assert all(row["input_size"] == [64, 96] and row["seconds_min"] > 0 for row in rows)
    assert rows[1]["seconds_ratio"] == pytest.approx(rows[1]["seconds_min"] / rows[0]["seconds_min"])
    ours, theirs = printed["metric"]
    assert (ours["contender"], theirs["contender"]) == ("mvit", "pycocotools")
    assert ours["largest_difference"] <= 1e-6
    assert ours["speedup"] == pytest.approx(theirs["cpu_seconds"] / ours["cpu_seconds"])


def test_a_single_part_is_shown_as_a_table_and_only_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "detection", "--only", "metric", "--images", "5"]) == 0
    printed = capsys.readouterr().out
    assert "pycocotools" in printed
    assert "hwin" not in printed


def test_the_synthetic_set_is_the_same_for_a_seed_and_has_all_sizes_and_crowds() -> None:
    truth, results = synthetic_set(40)
    assert (truth, results) == synthetic_set(40)
    assert truth != synthetic_set(40, seed=1)[0]
    areas = [row["area"] for row in truth["annotations"]]
    assert min(areas) < 32**2 < 96**2 < max(areas)
    assert any(row["iscrowd"] for row in truth["annotations"])
    for row in [*truth["annotations"], *results]:
        left, top, width, height = row["bbox"]
        assert min(left, top) >= 0
        assert max(left + width - 640, top + height - 480) < 0.02


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot bench 'local'; choose from"):
        bench_attention(attentions=["local"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="32 pixels or more"):
        bench_attention(input_size=(16, 64))
    with pytest.raises(ValueError, match="images = 0"):
        bench_metric(0)
