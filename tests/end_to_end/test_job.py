"""The real launcher with the real trainer: two ranks under DeepSpeed, stopped, resumed and killed on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mvit.config import RunConfig
from tests.mvit.test_training import records, tiny_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster" / "local_cpu2.yaml"
pytestmark = pytest.mark.timeout(900)


def _mvit(*arguments: str | Path, expect: int = 0) -> str:
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _submit(config: RunConfig, tmp_path: Path) -> list[str | Path]:
    recipe = tmp_path / f"{config.name}.yaml"
    recipe.write_text(config.to_yaml())
    return ["submit", recipe, "--cluster", CLUSTER, "--follow"]


def _follow_until(config: RunConfig, tmp_path: Path, step: int) -> "subprocess.Popen[str]":
    """Submit, and return the following process once the run has logged `step`."""
    command = [sys.executable, "-m", "launcher.cli", *map(str, _submit(config, tmp_path))]
    following = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (config.run_dir / "metrics.jsonl").is_file() or not _logged(config, step):
        assert following.poll() is None, following.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.1)
    return following


def _logged(config: RunConfig, step: int) -> bool:
    text = (config.run_dir / "metrics.jsonl").read_text()
    return f'"step": {step},' in text


def _rank_record(config: RunConfig, rank: int) -> dict[str, Any]:
    return json.loads((config.run_dir / "logs" / "attempt_001" / f"rank_{rank:04d}.json").read_text())


def test_usr2_to_a_running_job_saves_and_the_resumed_job_loses_nothing(digits: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": {"log_every": 5}}
    whole, broken = (tiny_config(digits, tmp_path, name, **options) for name in ("whole", "broken"))
    _mvit(*_submit(whole, tmp_path))
    following = _follow_until(broken, tmp_path, 5)
    os.kill(_rank_record(broken, 1)["pid"], signal.SIGUSR2)  # one rank alone is told, all must stop
    output = following.communicate(timeout=300)[0]
    assert following.returncode == 85, output
    stopped_at = json.loads(_mvit("status", broken.run_dir, "--json"))
    assert (stopped_at["state"], 5 < stopped_at["step"] < 24) == ("stopped", True)
    _mvit("resume", broken.run_dir, "--follow")
    every_fifth = [
        [(r["step"], r["loss"], r["lr"]) for r in records(c.run_dir) if r["step"] % 5 == 0] for c in (whole, broken)
    ]
    assert every_fifth[0] == every_fifth[1]
    evaluations = [[(r["step"], r["top1"], r["loss"]) for r in records(c.run_dir, "evaluate")] for c in (whole, broken)]
    assert evaluations[0] == evaluations[1]


def test_a_rank_that_is_killed_ends_the_job_within_seconds(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, schedule={"epochs": 50})
    following = _follow_until(config, tmp_path, 2)
    began = time.monotonic()
    os.kill(_rank_record(config, 1)["pid"], signal.SIGKILL)
    output = following.communicate(timeout=120)[0]
    assert time.monotonic() - began < 30
    assert following.returncode == 1, output
    assert "SIGKILL" in output
    assert "rank 1" in output
    assert json.loads(_mvit("status", config.run_dir, "--json"))["state"] == "failed"
