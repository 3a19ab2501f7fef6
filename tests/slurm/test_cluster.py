"""What the tests on Slurm rely on: real nodes, real faults, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.slurm.cluster import Cluster, Settings
from tests.slurm.daemons import program
from tests.slurm.processes import environment_of, executable_of

ROOT = Path(__file__).resolve().parents[2]


def submit(cluster: Cluster, folder: Path, command: str, *options: str) -> str:
    """Submit a batch job of one command, its output in <folder>/<job id>.out, and return its id."""
    return cluster.run("sbatch", "--parsable", f"--output={folder}/%j.out", *options, "--wrap", command)


def running(cluster: Cluster, job_id: str, num_ranks: int = 1, life: int = 0) -> dict[int, list[int]]:
    """Wait until all ranks of a life of a job run and return their pids."""
    cluster.wait_job(job_id, lambda job: job["JobState"] == "RUNNING" and job["Restarts"] == str(life), 90)
    end = time.monotonic() + 10
    while len(ranks := cluster.rank_pids(job_id)) < num_ranks:
        assert time.monotonic() < end, f"job {job_id} has ranks {ranks} only"
        time.sleep(0.05)
    return ranks


def owned_by(root: Path) -> list[int]:
    """Return every process of this machine whose command line or environment names a cluster's folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                named = str(root).encode() in (process / "cmdline").read_bytes()
            except OSError:
                continue
            if named or str(root) in environment_of(int(process.name)).get("SLURM_CONF", ""):
                found.append(int(process.name))
    return found


def bridges() -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob("mv[bc]*")}


def test_a_job_on_two_nodes_sees_two_hosts_with_names_and_addresses(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "srun sh -c 'hostname; hostname -i'", "--nodes=2", "--ntasks-per-node=1")
    job = cluster.wait_job(job_id, lambda job: job["JobState"] == "COMPLETED")
    lines = (tmp_path / f"{job_id}.out").read_text().split()
    assert job["NodeList"] == "node[1-2]"
    assert len(set(lines)) == 4
    assert {"node1", "node2"} < set(lines)


def test_the_pids_of_a_rank_are_found_from_outside(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "srun sleep 60", "--nodes=2", "--ntasks-per-node=2")
    ranks = running(cluster, job_id, num_ranks=4)
    assert list(ranks) == [0, 1, 2, 3]
    os.kill(ranks[3][0], signal.SIGKILL)
    cluster.run("scancel", job_id)
    cluster.wait_job(job_id, lambda job: job["JobState"] == "CANCELLED")


def test_a_node_without_power_or_cable_is_noticed_and_its_job_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "srun sleep 60", "--nodelist=node3")
    other = submit(cluster, tmp_path, "srun sleep 60", "--nodelist=node4")
    unplugged = running(cluster, other)[0][0]
    running(cluster, job_id)
    cluster.power_off("node3")
    assert cluster.pids_on("node3") == []
    cluster.unplug("node4")
    cluster.wait_nodes("down", ["node3", "node4"])
    assert Path(f"/proc/{unplugged}").exists()  # nobody reaches it, yet it runs: split brain
    for job in (job_id, other):
        cluster.wait_job(job, lambda job: job["Restarts"] == "1")
    cluster.plug("node4")
    cluster.power_on("node3")
    cluster.wait_nodes(("idle", "allocated", "mixed"))
    cluster.run("scancel", job_id, other)
    cluster.wait_nodes("idle")


def test_a_killed_slurmd_leaves_its_step_alive(cluster: Cluster, tmp_path: Path) -> None:
    slurmd = os.path.realpath(program("slurmd"))
    job_id = submit(cluster, tmp_path, "srun sleep 60", "--nodelist=node2")
    rank = running(cluster, job_id)[0][0]
    assert slurmd in {executable_of(pid) for pid in cluster.pids_on("node2")}
    cluster.kill_slurmd("node2")
    time.sleep(0.5)
    assert slurmd not in {executable_of(pid) for pid in cluster.pids_on("node2")}
    assert rank in cluster.pids_on("node2")
    cluster.power_off("node2")
    assert not Path(f"/proc/{rank}").exists()
    cluster.power_on("node2")
    cluster.run("scancel", job_id)
    cluster.wait_nodes("idle")


def test_two_clusters_side_by_side_know_nothing_of_each_other(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster(Settings(nodes=1, gpus=2)) as other:
        job_id = submit(other, tmp_path, "srun sh -c 'echo $CUDA_VISIBLE_DEVICES'", "--gpus-per-node=2")
        other.wait_job(job_id, lambda job: job["JobState"] == "COMPLETED")
        assert (tmp_path / f"{job_id}.out").read_text().split() == ["0,1"]
        assert other.node_states() == {"node1": "idle"}
        assert set(cluster.node_states()) == {"node1", "node2", "node3", "node4"}


def test_nothing_is_left_of_a_stopped_cluster_whose_job_runs(slurm_available: None, tmp_path: Path) -> None:
    before = bridges()
    with Cluster(Settings(nodes=2)) as stopped:
        job_id = submit(stopped, tmp_path, "srun sleep 60", "--nodes=2", "--ntasks-per-node=1")
        running(stopped, job_id, num_ranks=2)
        assert len(owned_by(stopped.root)) > 6
    assert owned_by(stopped.root) == []
    assert bridges() == before
    assert not stopped.root.exists()


def test_a_killed_test_run_leaves_no_process_and_the_next_cluster_takes_its_bridge_away(
    slurm_available: None, tmp_path: Path
) -> None:
    code = (
        "from tests.slurm.cluster import Cluster, Settings\n"
        "with Cluster(Settings(nodes=1)) as c:\n"
        " print(c.root, flush=True)\n"
        " input()\n"
    )
    before = bridges()
    victim = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout
    root = Path(victim.stdout.readline().strip())
    assert root.exists()
    victim.kill()
    victim.wait()
    for _ in range(100):
        if not owned_by(root):
            break
        time.sleep(0.05)
    assert owned_by(root) == []
    with Cluster(Settings(nodes=1)):
        pass
    assert bridges() == before
    assert not root.exists()


def test_preemption_signals_a_job_only_where_the_site_says_so(slurm_available: None, tmp_path: Path) -> None:
    short = Settings(nodes=1, grace_time_s=4, kill_wait_s=2)
    command = "srun sh -c \"trap 'echo USR2' USR2; trap 'echo TERM' TERM; while :; do sleep 0.1; done\""
    with Cluster(short) as telling, Cluster(replace(short, send_user_signal=False)) as silent:
        both = {telling: tmp_path / "telling", silent: tmp_path / "silent"}
        low, high = {}, {}
        for site, folder in both.items():
            folder.mkdir()
            low[site] = submit(site, folder, command, "--exclusive", "--signal=USR2@30")
            running(site, low[site])
        time.sleep(0.5)  # for the traps
        for site, folder in both.items():
            high[site] = submit(site, folder, "sleep 0.1", "--partition=high", "--exclusive")
        for site, folder in both.items():
            site.wait_job(high[site], lambda job: job["JobState"] == "COMPLETED", 60)
            assert site.job(low[site])["Restarts"] == "1"
            seen = (folder / f"{low[site]}.out").read_text().split("\n")
            assert ("USR2" in seen) == (site is telling)
            assert "TERM" in seen
