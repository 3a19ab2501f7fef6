"""On a real Slurm: bad submissions fail at once, and the doctor finds the sick node."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from launcher.cluster import ClusterError, parse_cluster, place
from launcher.slurm import read_slurm
from launcher.submission_checks import check_submission
from tests.launcher.project import ROOT, create_project
from tests.slurm.cluster import Cluster, Settings

SMALL = {"executor": "slurm", "nodes": 2, "ranks_per_node": 1, "timeout_min": 30, "partition": "low"}


@pytest.fixture(autouse=True)
def on_cluster(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a cluster file, in the cluster's environment."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)


def check(dependency: str | None = None, **changes: Any) -> None:
    settings = parse_cluster({**SMALL, **changes}, "test")
    check_submission(settings, place(settings), dependency)


def test_what_the_cluster_can_run_is_accepted(cluster: Cluster) -> None:
    check()
    check(nodes=4, cpus_per_rank=2, mem="4000M", constraint="a|b")
    running = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 30")
    check(dependency=f"afterok:{running}")
    cluster.run("scancel", running)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nodes": 5}, "nodes=5: partition 'low' has 4 node(s)"),
        ({"ranks_per_node": "auto", "gpus_per_node": 1}, "0 have as many GPUs, the most is 0"),
        ({"cpus_per_rank": 3}, "1 × 3 = 3: of the 4 node(s) of partition 'low', 0 have as many CPUs, the most is 2"),
        ({"mem": "5G"}, "0 have as much memory, the most is 4000M"),
        ({"partition": "hihg"}, "did you mean 'high'?"),
        ({"constraint": "a&fast"}, "no node has the feature 'fast'"),
        ({"constraint": "a", "nodes": 3}, "2 have these features"),
        ({"exclude": "node[3-5]"}, "there is no node 'node5'"),
        ({"exclude": "node[1-3]"}, "1 are left"),
    ],
    ids=str,
)
def test_what_it_can_never_run_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ClusterError) as refusal:
        check(**changes)
    assert told in str(refusal.value)


def test_a_time_limit_above_the_partition_s_is_refused(cluster: Cluster) -> None:
    cluster.run("scontrol", "update", "partitionname=high", "MaxTime=20")
    try:
        with pytest.raises(ClusterError, match=r"timeout_min=30: .*'high' is 20 minutes"):
            check(partition="high")
    finally:
        cluster.run("scontrol", "update", "partitionname=high", "MaxTime=INFINITE")


def test_an_unmet_dependency_is_refused(cluster: Cluster) -> None:
    failed = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 3")
    cluster.wait_job(failed, lambda job: job["JobState"] == "FAILED")
    with pytest.raises(ClusterError, match=f"job {failed} ended FAILED, and afterok wants it to end well"):
        check(dependency=f"afterok:{failed}")
    check(dependency=f"afternotok:{failed}")
    with pytest.raises(ClusterError, match="Slurm knows no job 999999"):
        check(dependency="afterok:999999")


@pytest.mark.skipif(shutil.which("mariadbd") is None, reason="accounting needs mariadb-server")
def test_an_unknown_account_and_qos_are_refused_where_there_is_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(Settings(nodes=1, accounting="dbd")) as accounted:
        for name, value in accounted.env.items():
            monkeypatch.setenv(name, value)
        facts = read_slurm()
        assert facts is not None
        assert facts.accounting is not None
        check(nodes=1, account=facts.accounting.accounts[0], qos="normal")
        with pytest.raises(ClusterError, match="account=nobodys: this cluster has none of this name"):
            check(nodes=1, account="nobodys")
        with pytest.raises(ClusterError, match=r"qos=nromal: .*did you mean 'normal'"):
            check(nodes=1, qos="nromal")


def test_a_refused_submission_creates_nothing(tmp_path: Path, cluster: Cluster) -> None:
    project = create_project(tmp_path / "project")
    (project.root / "cluster.yaml").write_text(yaml.safe_dump(SMALL | {"nodes": 8}))
    before = cluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    result = project.submit()
    assert result.returncode == 1
    assert "error: nodes=8: partition 'low' has 4 node(s). " in result.stderr
    assert not project.run_dir.exists()
    assert cluster.run("squeue", "-h", "-t", "all", "-o", "%i") == before


@pytest.fixture
def drained(cluster: Cluster) -> Iterator[None]:
    """Let no node take a job during a test."""
    names = ",".join(cluster.names)
    cluster.run("scontrol", "update", f"nodename={names}", "state=drain", "reason=bad memory")
    yield
    cluster.run("scontrol", "update", f"nodename={names}", "state=resume")
    cluster.wait_nodes("idle")


def test_nodes_that_are_all_drained_are_a_warning(drained: None, capsys: pytest.CaptureFixture[str]) -> None:
    check()
    told = capsys.readouterr().err
    assert told.startswith("warning: 0 of the 4 nodes of partition 'low' can run a job now, 2 are asked for: the job")
    assert "node1 IDLE+DRAIN bad memory" in told


def test_the_doctor_without_a_job_judges_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cluster", "slurm.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {one["check"]: one for one in told["findings"]}
    assert found["Slurm"]["found"].startswith("2")
    assert found["request"]["found"] == "2 node(s) × 1 rank(s) of partition 'low'"
    assert found["preemption signal"]["level"] == "PASS"
    assert "waits 6 s" in found["requeue delay"]["why"]
    assert "#SBATCH --partition=low" in told["script"]
    assert main(["doctor", "--cluster", "slurm.yaml", "nodes=9"]) == 1
    assert "FAIL  request: nodes=9" in capsys.readouterr().out


def test_a_job_on_two_nodes_measures_both(
    tmp_path: Path, digits: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "demo" / "digits.yaml").read_text())
    recipe["data"] |= {"train": str(digits / "train"), "validation": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    code = main(["doctor", "recipe.yaml", "--cluster", "slurm.yaml", "--submit", "--json"])

    report = capsys.readouterr().out
    assert code == 0, report
    told = json.loads(report)
    nodes = told["nodes"]["nodes"]
    assert [node["node"] for node in nodes] == ["node1", "node2"]
    for node in nodes:
        assert node["level"] != "FAIL"
        for figure in ("tflops", "allreduce_gb_s", "read_mb_s", "write_mb_s", "free_gib"):
            assert node["figures"][figure] > 0
        assert abs(node["figures"]["clock_ms"]) < 1000
    job = cluster.job(told["nodes"]["job_id"])
    assert (job["JobState"], job["TimeLimit"], job["Partition"]) == ("COMPLETED", "00:02:00", "low")


def test_only_the_node_that_computes_wrongly_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(SMALL | {"env": {"MVIT_DOCTOR_FAULT": "gemm@1"}}))
    assert main(["doctor", "--cluster", "slurm.yaml", "--submit"]) == 1
    told = capsys.readouterr().out
    table = told[told.index("--- nodes") :].splitlines()
    assert table[2].split()[0] == "node1"
    assert table[2].split()[1] != "FAIL"
    assert table[3].split()[:2] == ["node2", "FAIL"]
    assert "node2: rank 1: a matrix product with a known answer is wrong" in table


def test_a_node_that_cannot_start_python_is_the_one_that_fails(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other ranks are not ended with it, as those of a training job would be."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SLURM_PROCID') == '1': os._exit(7)\n")
    settings = SMALL | {"setup": [f"export PYTHONPATH={tmp_path}"]}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(settings))
    assert main(["doctor", "--cluster", "slurm.yaml", "--submit", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["nodes"]["nodes"]
    assert (first["node"], first["level"]) == ("node1", "WARN")
    assert "since rank 1 was absent" in first["problems"][0]
    assert (second["node"], second["level"]) == ("node2", "FAIL")
    assert second["problems"][0].startswith("rank 1 left no report")


def test_a_job_that_does_not_start_in_time_is_cancelled(
    drained: None, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--cluster", "slurm.yaml", "--submit", "--timeout", "2"]) == 1
    told = capsys.readouterr().err
    assert "is still queued after 2 s, and was cancelled" in told
    assert cluster.run("squeue", "-h", "-t", "PENDING,RUNNING") == ""


def test_ctrl_c_cancels_the_job(drained: None, cluster: Cluster) -> None:
    doctor = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "doctor", "--cluster", "slurm.yaml", "--submit"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert doctor.stderr is not None
    while "queued" not in doctor.stderr.readline():  # while sbatch runs, Ctrl-C is held off
        assert doctor.poll() is None
    doctor.send_signal(signal.SIGINT)
    assert "error: interrupted" in doctor.communicate(timeout=60)[1]
    assert cluster.run("squeue", "-h", "-t", "PENDING,RUNNING") == ""
