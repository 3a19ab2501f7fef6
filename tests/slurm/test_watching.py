"""Watching and ending runs on a real Slurm: queued, running, requeued, and cancelled behind our back."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher.run_folder import RunFolder
from tests.launcher.project import Project, create_project, wait_until
from tests.slurm.cluster import Cluster

SETTINGS = {
    "executor": "slurm",
    "nodes": 2,
    "ranks_per_node": 1,
    "mem": "100M",
    "timeout_min": 10,
    "signal_delay_s": 60,
}
LONG = ("steps=100000", "step_s=0.05", "save_every=1000000")


@dataclass(frozen=True)
class Watched:
    """A stand-in project whose command line talks to the toy cluster."""

    project: Project
    cluster: Cluster

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.project.run_dir)

    @property
    def environment(self) -> dict[str, str]:
        return {**self.project.environment(), **self.cluster.env}

    def mvit(self, *arguments: str, expect: int = 0) -> str:
        result = self.project.mvit(*arguments, environment=self.environment)
        assert result.returncode == expect, f"{arguments}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    def about(self, command: str, *options: str, expect: int = 0) -> str:
        return self.mvit(command, str(self.run.path), *options, expect=expect)

    def submit(self, *overrides: str) -> str:
        """Submit and return the job's id."""
        shown = self.mvit("submit", "recipe.yaml", "--cluster", "slurm.yaml", "--json", *overrides)
        return json.loads(shown)["job_id"]

    def wait_for_step(self, step: int, life: int) -> None:
        """Wait until the ranks of a life train."""
        wait_until(lambda: any(e["event"] == "start" and e["attempt"] == life for e in self.run.events()), 90)
        wait_until(lambda: len(self.project.facts(0)) >= life, 60)
        wait_until(lambda: self.state()["step"] >= step, 60)

    def state(self) -> dict:
        return json.loads(self.about("status", "--json"))


@pytest.fixture
def watched(tmp_path: Path, cluster: Cluster) -> Iterator[Watched]:
    project = create_project(tmp_path)
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(SETTINGS))
    yield Watched(project, cluster)
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "-h"), 60)


def test_a_queued_job_says_why_it_waits_and_is_stopped_without_having_run(watched: Watched) -> None:
    blocker = watched.cluster.run(
        "sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600"
    )
    watched.cluster.wait_job(blocker, lambda job: job["JobState"] == "RUNNING")
    job_id = watched.submit("steps=5")
    watched.cluster.wait_job(job_id, lambda job: job["Reason"] in ("Resources", "Priority"))

    assert "trial: pending (Slurm says PENDING (" in watched.about("status")
    why = watched.about("why")
    assert "it is next, and waits for free nodes" in why or "other jobs stand before it" in why
    assert "no life has ended yet" in why
    assert "has no log yet: it is pending" in watched.about("logs", expect=1)

    assert f"Slurm job {job_id} was waiting: taken out of the queue" in watched.about("stop", "--wait")
    assert watched.cluster.job(job_id)["JobState"] == "CANCELLED"
    assert watched.state()["state"] == "stopped"

    watched.about("resume")
    watched.cluster.run("scancel", blocker)
    wait_until(lambda: watched.state()["state"] == "finished", 90)  # the stop of before is not honoured again
    assert "rank 1 of 2 trains from step 0" in watched.about("logs", "--rank", "1")


def test_a_running_job_is_followed_through_a_requeue_and_stopped_with_a_save(watched: Watched) -> None:
    job_id = watched.submit(*LONG)
    following = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "logs", str(watched.run.path), "--follow", "--all"],
        cwd=watched.project.root,
        env=watched.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watched.wait_for_step(1, life=1)
    state = watched.state()
    assert (state["state"], state["attempt"], len(state["hosts"])) == ("running", 1, 2)
    assert f"attempt 1, slurm, job {job_id} on node" in watched.about("status")
    table = watched.mvit("status", "--runs", str(watched.project.root / "runs"))
    assert table.splitlines()[1].split()[1] == "running"
    assert table.splitlines()[1].split()[-1] == job_id

    watched.cluster.run("scancel", "--signal=USR2", job_id)  # as Slurm does before a time limit
    wait_until(lambda: any(event["event"] == "end" for event in watched.run.events()), 60)
    wait_until(lambda: watched.state()["state"] == "pending", 30)
    why = watched.about("why")
    assert ": signalled\n" in why
    assert "what followed: requeued" in why

    watched.wait_for_step(state["step"] + 1, life=2)
    assert "mvit stop" in watched.about("stop", "--wait") or watched.state()["state"] == "stopped"
    stopped = watched.state()
    assert stopped["state"] == "stopped"
    assert stopped["checkpoint_step"] == stopped["step"] > state["step"]
    output, notes = following.communicate(timeout=60)
    assert following.returncode == 0
    assert output.count("[1] rank 1 of 2 trains from step") == 2
    assert "--- attempt 2" in notes
    assert "--- the run is stopped" in notes
    assert ": user_stop\n" in watched.about("why")
    assert "requeue" in watched.about("logs", "--submitit")


def test_a_stop_while_the_job_is_back_in_the_queue_is_not_lost(watched: Watched) -> None:
    job_id = watched.submit(*LONG)
    watched.wait_for_step(1, life=1)
    watched.cluster.run("scontrol", "requeue", job_id)  # an administrator, say; nobody saves
    shown = watched.about("stop", "--wait")
    assert watched.state()["state"] == "stopped", shown
    job = watched.cluster.wait_job(job_id, lambda job: job["JobState"] not in ("RUNNING", "COMPLETING", "PENDING"))
    assert job["JobState"] == "CANCELLED"
    assert len(watched.project.facts(0)) == 1  # no second life has trained
    assert "taken out of the queue by `mvit stop` while it waited again" in watched.about("why")


def test_a_job_cancelled_behind_our_back_is_seen_and_can_be_resumed(watched: Watched) -> None:
    job_id = watched.submit(*LONG)
    watched.wait_for_step(1, life=1)
    watched.cluster.run("scancel", job_id)
    wait_until(lambda: watched.state()["state"] == "stopped", 60)
    assert "trial: stopped (cancelled in Slurm (scancel), everything saved)" in watched.about("status")
    assert f"continue with: mvit resume {watched.run.path}" in watched.about("why")
    assert "trains from step 0" in watched.about("logs")
    wait_until(lambda: not watched.cluster.run("squeue", "-h"), 30)
    watched.about("resume")
    watched.wait_for_step(1, life=2)
    assert "cancelled slurm job" in watched.about("cancel", "--wait")
    assert not watched.cluster.run("squeue", "-h")


def test_a_watcher_sees_the_run_from_the_queue_to_its_end(watched: Watched) -> None:
    watched.submit("steps=60")
    began = time.monotonic()
    seen = watched.about("status", "--watch", "--json").splitlines()
    states = [json.loads(line)["state"] for line in seen]
    assert states[-1] == "finished"
    assert set(states) <= {"pending", "running", "finished"}
    assert time.monotonic() - began < 55
