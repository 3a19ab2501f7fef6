"""One real training job after another is hit by everything a cluster does; the weights come out as if nothing was.

Each job runs on two nodes of two ranks under DeepSpeed. Faults of its own processes come through MVIT_FAULTS, those of
the cluster from here, at a step that is slow enough to be met. What is measured is printed: docs/launching.md has it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvit.checkpoint import list_steps
from tests.mvit.test_training import records
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.job import TrainingJob, job_config

EPOCHS = 4.1
STEPS = 92
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Return the run that nothing happened to."""
    job = _job(cluster, digits, tmp_path_factory.mktemp("undisturbed"), "plain").submit()
    job.wait_finished()
    return job


def _job(cluster: Cluster, digits: Path, folder: Path, name: str, faults: str = "", **settings: Any) -> TrainingJob:
    config = job_config(digits, folder, name, schedule={"epochs": EPOCHS, "warmup_epochs": 0.2})
    return TrainingJob(cluster, config, settings, faults)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[str, float], None]:
    """Print a measured time beside the test's name."""

    def tell(what: str, seconds: float) -> None:
        with capsys.disabled():
            print(f"\n  {what}: {seconds:.1f} s", flush=True)

    return tell


def _check_whole(job: TrainingJob, undisturbed: TrainingJob, lives: int) -> None:
    """The promise of every fault: same job, same folder, same weights, every step once, one curve."""
    assert job.life() == lives, job.report()
    assert {event["job_id"] for event in job.events("start")} == {job.job_id}
    assert list_steps(job.run_dir)[-1] == STEPS
    assert job.final_hashes() == undisturbed.final_hashes()
    assert job.losses() == undisturbed.losses()
    reader = EventAccumulator(str(job.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    curve = reader.Scalars("train/loss")
    assert [point.step for point in curve] == list(range(1, STEPS + 1))
    assert [point.value for point in curve] == pytest.approx([loss for _, loss in job.losses()], rel=1e-6)
    starts = [event["checkpoint_step"] for event in job.events("start")]
    assert starts == sorted(starts)


def _check_life(job: TrainingJob, life: int, kind: str, *, lost_at_most: int) -> dict[str, Any]:
    """Check how a life ended and that the next one lost no more than it may; returns its end."""
    end = next(event for event in job.ends() if event["attempt"] == life)
    assert end["kind"] == kind, f"{end}\n{job.report()}"
    begun = next(event for event in job.events("restored") if event["attempt"] == life + 1)
    assert 0 <= (end["step"] or 0) - begun["step"] <= lost_at_most, (end, begun)
    return end


def test_faults_of_the_ranks(
    cluster: Cluster,
    undisturbed: TrainingJob,
    digits: Path,
    tmp_path: Path,
    told: Callable[[str, float], None],
) -> None:
    """USR2 during start-up, kill -9 twice on one node, an exception, a hang, a full disk, scontrol requeue."""
    faults = "kill@12:1,raise@24:2,kill@35:0,hang@47:3,full-disk@59,slow@76,slow@77"
    job = _job(cluster, digits, tmp_path, "ranks", faults).submit()
    job.wait(lambda: job.events("start"), "the start of the ranks")
    cluster.run("scancel", "-s", "USR2", job.job_id)  # what comes before a time limit, now while torch is imported
    for life in range(2, 7):
        first = job.wait_for_life(life)
        end = next(event for event in job.ends() if event["attempt"] == life - 1)
        told(f"life {life - 1} {end['kind']}, record of its end to the next finished step", first["time"] - end["time"])
    job.wait_for_step(75)
    began = time.time()
    cluster.run("scontrol", "requeue", job.job_id)
    told("scontrol requeue to the next finished step", job.wait_for_life(7)["time"] - began)
    job.wait_finished()

    _check_life(job, 1, "signalled", lost_at_most=0)
    killed = _check_life(job, 2, "killed", lost_at_most=10)
    assert (killed["rank"], killed["host"], killed["blamed"]) == (1, "node1", ["node1"])
    raised = _check_life(job, 3, "error", lost_at_most=10)
    assert raised["rank"] == 2
    assert "InjectedFault" in raised["detail"]
    _check_life(job, 4, "killed", lost_at_most=10)
    (exclusion,) = [event for event in job.events("exclude") if event["attempt"] == 4]
    assert exclusion["hosts"] == ["node1"]
    assert all("node1" not in event["hosts"] for event in job.events("start") if event["attempt"] > 4)
    hung = _check_life(job, 5, "hung", lost_at_most=10)
    assert hung["rank"] == 3
    stacks = sorted((job.run_dir / "logs" / "attempt_005").glob("*.stacks.txt"))
    assert len(stacks) == 4, "a stack of every rank"
    assert "faults.py" in stacks[3].read_text()
    assert not [event for event in job.events("saved") if event["attempt"] == 6 and event["step"] == 60]
    assert "No space left" in (job.run_dir / "logs" / "attempt_006" / "rank_0000.log").read_text()
    _check_life(job, 6, "preempted", lost_at_most=10)  # SIGTERM, and SIGKILL 5 s later, within one slow step
    _check_whole(job, undisturbed, lives=7)


def test_faults_of_the_nodes(
    cluster: Cluster,
    undisturbed: TrainingJob,
    digits: Path,
    tmp_path: Path,
    told: Callable[[str, float], None],
) -> None:
    """A node without power, one whose slurmd died and one whose cable was pulled, both with ranks that live on."""
    job = _job(
        cluster,
        digits,
        tmp_path,
        "nodes",
        ",".join(f"slow@{step}" for step in (16, 17, *range(36, 46), 56, 57)),
        hang_timeout_s=90,
    ).submit()

    def nodes_of(life: int) -> list[str]:
        return next(event["hosts"] for event in job.events("start") if event["attempt"] == life)

    job.wait_for_step(15)
    lost, began = nodes_of(1)[1], time.time()
    cluster.power_off(lost)
    told("power off to the next finished step", job.wait_for_life(2)["time"] - began)
    _check_life(job, 1, "node", lost_at_most=10)
    assert next(end["blamed"] for end in job.ends()) == [lost]
    cluster.power_on(lost)

    job.wait_for_step(35)
    deaf, began = nodes_of(2)[0], time.time()  # the batch host: its script lives on, too
    cluster.kill_slurmd(deaf)  # the ranks train on until Slurm notices: their steps are slow for as long
    told("slurmd killed to the next finished step", job.wait_for_life(3)["time"] - began)
    _check_life(job, 2, "node", lost_at_most=10)
    job.wait(lambda: not _alive(cluster, deaf, job.job_id), "the end of the orphans", 30)
    cluster.power_off(deaf)
    cluster.power_on(deaf)

    job.wait_for_step(55)
    cut, began = nodes_of(3)[1], time.time()
    cluster.unplug(cut)
    told("cable pulled to the next finished step", job.wait_for_life(4)["time"] - began)
    _check_life(job, 3, "node", lost_at_most=10)
    job.wait(lambda: not _alive(cluster, cut, job.job_id), "the end of the orphans", 30)
    cluster.power_off(cut)
    cluster.power_on(cut)
    job.wait_finished()
    _check_whole(job, undisturbed, lives=4)


def _alive(cluster: Cluster, node: str, job_id: str) -> list[int]:
    """Return the pids of a job's ranks that still run on a node."""
    return [
        pid
        for pid in cluster.pids_on(node)
        if (environment := cluster.environment_of(pid)).get("SLURM_JOB_ID") == job_id and "SLURM_STEP_ID" in environment
    ]


def test_preemption_with_slurms_warning(
    cluster: Cluster,
    undisturbed: TrainingJob,
    digits: Path,
    tmp_path: Path,
    told: Callable[[str, float], None],
) -> None:
    job = _job(cluster, digits, tmp_path, "preempted", "slow@16,slow@17").submit()
    job.wait_for_step(15)
    began = time.time()
    high = cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N4", "-n4", "-c2", "--wrap", "sleep 2", "-o", "/dev/null"
    )
    cluster.wait_job(high, lambda state: state["JobState"] == "COMPLETED")
    told("preempted until the other job was done", time.time() - began)
    told("preempted to the next finished step", job.wait_for_life(2)["time"] - began)
    job.wait_finished()
    _check_life(job, 1, "signalled", lost_at_most=0)
    _check_whole(job, undisturbed, lives=2)


def test_time_limit_and_preemption_without_warning(
    undisturbed: TrainingJob, digits: Path, tmp_path: Path, told: Callable[[str, float], None]
) -> None:
    """The limit's signal comes while training; a cluster that warns nobody of a preemption sends SIGTERM at least."""
    slow = ",".join(f"slow@{step}" for step in range(16, 32))
    limits = {"timeout_min": 2, "signal_delay_s": 55}
    with Cluster(Settings(send_user_signal=False)) as quiet:
        job = _job(quiet, digits, tmp_path, "limited", f"{slow},slow@50,slow@51", **limits).submit()
        job.wait(lambda: job.ends(), "the signal before the time limit")
        saved = job.ends()[0]["time"]
        quiet.run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=60")  # the next life is to be preempted
        told("time limit: saved to the next finished step", job.wait_for_life(2)["time"] - saved)
        end = _check_life(job, 1, "signalled", lost_at_most=0)
        assert "USR2" in end["detail"]
        job.wait_for_step(49)
        began = time.time()
        high = quiet.run(
            "sbatch", "--parsable", "-p", "high", "-N4", "-n4", "-c2", "--wrap", "sleep 2", "-o", "/dev/null"
        )
        quiet.wait_job(high, lambda state: state["JobState"] == "COMPLETED")
        told("preempted without warning to the next finished step", job.wait_for_life(3)["time"] - began)
        job.wait_finished()
        _check_life(job, 2, "signalled", lost_at_most=0)
        _check_whole(job, undisturbed, lives=3)


def test_a_code_error_that_repeats_stops_the_run(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    job = _job(cluster, digits, tmp_path, "broken", "raise@3:1x9").submit()
    job.wait(lambda: job.ends() and not job.ends()[-1]["requeued"], "the end of the run")
    last = job.ends()[-1]
    assert (job.life(), last["kind"], last["rank"]) == (2, "error", 1), job.report()
    assert "the same error in step 3 as in life 1" in last["reason"]
    state = json.loads(job.mvit("status", job.run_dir, "--json"))
    assert state["state"] == "failed"
    assert records(job.run_dir)[-1]["step"] == 2
