"""Chains on a real Slurm: a run starts when the one before is finished, requeued or not, and goes when that fails.

The training is a stand-in that counts, so that only Slurm and the launcher are tested and a job takes a second.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launcher.project import Project, create_project, wait_until
from tests.slurm.cluster import Cluster

CLUSTER = {
    "executor": "slurm",
    "nodes": 1,
    "ranks_per_node": 2,
    "cpus_per_rank": 1,
    "mem": "400M",
    "timeout_min": 10,
    "signal_delay_s": 60,
    "max_failures_without_progress": 2,
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass(frozen=True)
class ChainProject:
    """The stand-in project with two recipes, submitted to a real cluster."""

    cluster: Cluster
    project: Project

    def run_dir(self, name: str) -> Path:
        return self.project.root / "runs" / name

    def mvit(self, *words: str | Path, check: bool = True) -> str:
        command = [sys.executable, "-m", "launcher.cli", *map(str, words)]
        environment = {"PYTHONPATH": str(self.project.tree), "PYTHONSAFEPATH": "1"}
        return self.cluster.run(*command, check=check, timeout=120, env=environment)

    def submit(self, *words: str) -> list[dict[str, Any]]:
        """Submit pre-training, fine-tuning and evaluation."""
        root = self.project.root
        then = ["--then", f"{root}/fine.yaml", "--then-evaluate", "--json"]
        printed = self.mvit("submit", root / "recipe.yaml", "--cluster", root / "slurm.yaml", *then, *words)
        return json.loads(printed)["runs"]

    def state(self, run_dir: Path) -> dict[str, Any]:
        return json.loads(self.mvit("status", run_dir, "--json"))

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        file = self.run_dir(name) / "attempts.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["event"] == event]


@pytest.fixture
def chain(cluster: Cluster, tmp_path: Path) -> ChainProject:
    project = create_project(tmp_path)
    fine = {"name": "fine", "output_dir": str(tmp_path / "runs"), "shards": f"{tmp_path}/shards", "steps": 40}
    (tmp_path / "fine.yaml").write_text(yaml.safe_dump({**fine, "validation": f"{tmp_path}/shards"}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**fine, "name": "trial"}))
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(CLUSTER))
    return ChainProject(cluster, project)


def test_each_run_starts_when_the_one_before_is_finished_however_often_that_is_requeued(chain: ChainProject) -> None:
    runs = chain.submit("cluster.env.MVIT_FAULTS=kill@4:1")  # once in each of the runs, so each is requeued once
    chain.cluster.wait_job(runs[0]["job_id"], lambda job: job["Restarts"] == "1", 90)
    assert chain.cluster.job(runs[1]["job_id"])["Reason"] == "Dependency", "the end of a life is not the end of the run"
    for run in runs:
        job = chain.cluster.wait_job(run["job_id"], lambda job: job["JobState"] in ENDED, 120)
        assert job["JobState"] == "COMPLETED", chain.mvit("status", run["run_dir"])
    first, second = chain.run_dir("trial"), chain.run_dir("fine")
    for name in ("trial", "fine"):
        assert [end["cause"] for end in chain.events(name, "end")] == ["failed", "finished"]
    finished = chain.events("trial", "end")[-1]["time"]
    assert all(start["time"] > finished for start in chain.events("fine", "start"))
    facts = [json.loads(line) for line in (second / "facts_0.jsonl").read_text().splitlines()]
    assert {life["weights"] for life in facts} == {str(first)}
    result = json.loads((second / "evaluation.json").read_text())
    assert (result["step"], result["world_size"], result["figures"]["top1"]) == (40, 2, 0.75)
    assert chain.state(second / "evaluation")["state"] == "finished"


def test_when_a_run_fails_for_good_the_rest_leaves_the_queue_and_resuming_all_makes_it_whole(
    chain: ChainProject,
) -> None:
    runs = chain.submit("raise_at=1")
    chain.cluster.wait_job(runs[0]["job_id"], lambda job: job["JobState"] == "FAILED", 120)
    for run in runs[1:]:
        chain.cluster.wait_job(run["job_id"], lambda job: job["JobState"] == "CANCELLED", 60)
    first, second, evaluation = (Path(run["run_dir"]) for run in runs)
    assert chain.state(first)["state"] == "failed"
    for folder in (second, evaluation):
        state = chain.state(folder)
        assert state["state"] == "failed"
        assert "the run it waited for did not finish" in state["detail"]
        assert "the fault at step 1" in state["detail"]
        assert not list(folder.glob("facts_*"))

    told = chain.mvit("resume", second, check=False)
    assert told == ""  # refused: its weights will not be there
    chain.mvit("resume", first, "raise_at=-1")
    for folder in (second, evaluation):
        chain.mvit("resume", folder)
    wait_until((second / "evaluation.json").exists, timeout=120)
    wait_until(lambda: chain.state(evaluation)["state"] == "finished")
    assert chain.state(second)["state"] == "finished"


def test_a_run_waits_for_one_that_was_submitted_before(chain: ChainProject) -> None:
    root = chain.project.root
    recipe = (root / "recipe.yaml", "--cluster", root / "slurm.yaml")
    first = json.loads(chain.mvit("submit", *recipe, "steps=100", "--json"))
    after = ("--after", chain.run_dir("trial"), "--json")
    second = json.loads(chain.mvit("submit", root / "fine.yaml", "--cluster", root / "slurm.yaml", *after))
    assert second["after"] == first["job_id"]
    assert chain.cluster.job(second["job_id"])["Dependency"].startswith(f"afterok:{first['job_id']}")
    for one in (first, second):
        chain.cluster.wait_job(one["job_id"], lambda job: job["JobState"] == "COMPLETED", 90)
    third = ("submit", root / "fine.yaml", "--cluster", root / "slurm.yaml", "name=third", *after)
    assert json.loads(chain.mvit(*third))["after"] is None  # that is finished already
    wait_until(lambda: chain.state(chain.run_dir("third"))["state"] == "finished", timeout=90)
