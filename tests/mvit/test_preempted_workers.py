"""A preemption that reaches every process of a job, data workers too, ends it with a save and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mvit.checkpoint import list_steps
from tests.mvit.test_training import records, tiny_config

ROOT = Path(__file__).parents[2]


def test_sigterm_to_workers_and_training_process_alike_is_a_stop_with_a_save(digits: Path, tmp_path: Path) -> None:
    data = {"num_workers": 2, "prefetch": 1}
    config = tiny_config(digits, tmp_path, data=data, schedule={"epochs": 500}, train={"save_every": 100_000})
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "launcher.cli", "train", str(tmp_path / "recipe.yaml")]
    with (tmp_path / "output").open("w") as output:
        # A run of another test in this process may still be the master of its own world of one.
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        alone = {key: value for key, value in alone.items() if not key.startswith("MASTER_")}
        process = psutil.Popen(command, cwd=ROOT, env=alone, stdout=output, stderr=subprocess.STDOUT)
    metrics = config.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.is_file() or len(records(config.run_dir)) < 3:
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.1)
    family = [process.pid, *(child.pid for child in process.children(recursive=True))]
    assert len(family) >= 5, "two workers, their fork server and a resource tracker"
    helpers = process.children(recursive=True)
    # The workers first, so that a training process that needs them has time to notice.
    subprocess.run(["kill", "-TERM", *map(str, reversed(family))], check=True)
    assert process.wait(timeout=120) == 85, (tmp_path / "output").read_text()
    stopped_at = records(config.run_dir)[-1]["step"]
    assert list_steps(config.run_dir) == [stopped_at]
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive
    end = json.loads((config.run_dir / "attempts.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["cause"]) == ("end", "stopped")
    assert signal.SIGTERM.name in end["detail"]
