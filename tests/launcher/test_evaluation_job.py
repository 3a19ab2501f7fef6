"""The job that evaluates a finished run: asked to stop, it leaves and says nothing; started again, it does its work."""

import json
import os
import signal

import pytest
import yaml

from tests.launcher.project import Project, wait_until


@pytest.mark.parametrize("by_signal", [False, True], ids=["mvit stop", "SIGTERM"])
def test_a_stop_ends_the_evaluation_with_exit_code_85_and_without_a_result(project: Project, by_signal: bool) -> None:
    recipe = project.root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "validation": "shards"}))
    words = ("--cluster", "cluster.yaml", "evaluate_s=600", "--then-evaluate", "--follow")
    follower = project.start("submit", "recipe.yaml", *words)
    called = project.run_dir / "evaluated.jsonl"
    wait_until(lambda: called.exists() and len(called.read_text().splitlines()) == 2)
    folder = project.run_dir / "evaluation"
    if by_signal:
        for record in (json.loads(file.read_text()) for file in (folder / "logs" / "attempt_001").glob("rank_*.json")):
            os.kill(record["pid"], signal.SIGTERM)
    else:
        stopped = project.mvit("stop", str(folder), "--wait")
        assert stopped.returncode == 0, stopped.stderr
    output, errors = follower.communicate(timeout=30)
    assert follower.returncode == 85, output + errors
    assert not (project.run_dir / "evaluation.json").exists()
    records = [json.loads(file.read_text()) for file in (folder / "logs" / "attempt_001").glob("rank_*.json")]
    assert [record["exit_code"] for record in records] == [85, 85]
    assert json.loads(project.mvit("status", str(folder), "--json").stdout)["state"] == "stopped"

    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace("evaluate_s: 600", "evaluate_s: 0")
    )
    resumed = project.mvit("resume", str(folder), "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads((project.run_dir / "evaluation.json").read_text())["figures"]["top1"] == 0.75
    log = (folder / "logs" / "attempt_002" / "rank_0000.log").read_text()
    assert f"of {project.run_dir}, " in log
    assert "top1 0.75" in log
