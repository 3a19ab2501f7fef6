"""`mvit plan`: a table for people, one JSON object for scripts, and an exit code."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.plan_command import GPU_NAMES

DIGITS = str(Path(__file__).parent.parent.parent / "configs" / "demo" / "digits.yaml")


def test_the_gpus_offered_are_those_the_planner_knows() -> None:
    from mvit.planner_time import GPUS

    assert tuple(GPUS) == GPU_NAMES


def test_a_plan_shows_the_choice_what_was_rejected_and_what_a_run_costs(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", DIGITS, "--gpus", "2", "--gpu-memory-gib", "16", "--samples", "1442", "--gpu", "l40s"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert told.startswith("digits: ")
    assert "fp32, 64 samples a step, 540 steps" in told
    assert "2 x l40s with 16 GiB, 8 in a node; training samples: 1442 (as given)" in told
    for words in ("chosen: the fastest that fits", "% slower", "(the recipe)", "the best micro-batch of each kind"):
        assert words in told
    for words in ("memory of a rank:", "network: each rank sends", "GPU-hours", "one checkpoint:", "note: times are"):
        assert words in told


def test_json_is_one_object_with_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DIGITS, "--gpus", "2", "--gpu-memory-gib", "16", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["gpus"] == 2
    assert made["chosen"]["overrides"][0].startswith("zero.stage=")
    assert len(made["candidates"]) > 20


def test_the_exit_code_is_1_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DIGITS, "--gpus", "2", "--gpu-memory-gib", "1", "--all"]) == 1
    told = capsys.readouterr().out
    assert len(told.splitlines()) > 4 * 5 * 5  # every stage, checkpointing and micro-batch
    assert "nothing fits; the least is " in told
    assert "chosen" not in told
    assert "does not fit: needs " in told


def test_an_impossible_number_of_gpus_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DIGITS, "--gpus", "7", "--gpu-memory-gib", "16", "--json"]) == 1
    captured = capsys.readouterr()
    assert "64 / 7 = 9.143; choose --gpus one of 2, 4, 8, 16" in captured.err
    assert "choose --gpus" in json.loads(captured.out)["error"]


def test_each_phase_is_planned_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "rising.yaml"
    recipe.write_text(f"base: {DIGITS}\nphases: [{{from_epoch: 12, image_size: [64, 64]}}]\n")
    words = ["plan", str(recipe), "--gpus", "2", "--gpu-memory-gib", "16", "--samples", "1442"]
    needed = []
    for phase in ("1", "2"):
        assert main([*words, "--phase", phase, "--json"]) == 0
        needed.append(json.loads(capsys.readouterr().out)["recipe_setting"]["memory"]["activations"])
    assert needed[1] > 3 * needed[0], "four times the pixels"
    assert main([*words, "--phase", "2"]) == 0
    assert "note: this is phase 2 of 2; its settings are phases.0.*" in capsys.readouterr().out
    assert main([*words, "--phase", "3"]) == 1
    assert "--phase 3: the recipe has 2 phase(s)" in capsys.readouterr().err
