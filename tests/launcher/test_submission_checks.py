"""Bad submissions fail at once, with key, value, rule and a way out; good ones pass."""

from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import ClusterError, parse_cluster, place
from launcher.submission_checks import check_submission
from tests.launcher import recorded

GOOD = {"executor": "slurm", "nodes": 2, "gpus_per_node": 2, "timeout_min": 60}


@pytest.fixture(autouse=True)
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put commands on PATH that answer as a real cluster did."""
    recorded.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def check(dependency: str | None = None, **changes: Any) -> None:
    cluster = parse_cluster({**GOOD, **changes}, "test")
    check_submission(cluster, place(cluster), dependency)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nodes": 4},
        {"nodes": 1, "partition": "short", "timeout_min": 30},
        {"nodes": 2, "partition": "short,low"},  # one of the two has room
        {"constraint": "a", "nodes": 2},
        {"constraint": "a|b", "nodes": 4},
        {"constraint": "[a*1&b*1]", "nodes": 2},
        {"exclude": "node4", "nodes": 3},
        {"mem": "0"},
        {"mem": "3G", "gpus_per_node": 0, "ranks_per_node": 2},
        {"account": "test", "qos": "normal"},
        {"qos": "long", "partition": "short", "nodes": 1, "timeout_min": 60},  # its flag lifts the partition's limit
        {"executor": "local", "nodes": 1, "gpus_per_node": 0},
    ],
    ids=str,
)
def test_what_the_cluster_can_run_is_accepted(changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nodes": 5}, ["nodes=5", "partition 'low' has 4 node(s)", "short (2 nodes)"]),
        ({"nodes": 2, "partition": "short", "timeout_min": 20}, ["nodes=2", "'short' may have 1 (MaxNodes)"]),
        ({"gpus_per_node": 4}, ["gpus_per_node=4", "0 have as many GPUs, the most is 2"]),
        (
            {"cpus_per_rank": 3},
            ["ranks_per_node × cpus_per_rank = 2 × 3 = 6", "the most is 2", "Lower cpus_per_rank"],
        ),
        ({"mem": "8G"}, ["mem=8G", "0 have as much memory, the most is 4000M", "0 asks for all"]),
        ({"mem": "3.9G"}, ["mem=3.9G", "whole number"]),
        ({"partition": "lwo"}, ["partition=lwo", "did you mean 'low'?"]),
        ({"partition": "gpu"}, ["partition=gpu", "there are: high, low, short"]),
        ({"account": "tset"}, ["account=tset", "did you mean 'test'?"]),
        ({"qos": "loong"}, ["qos=loong", "did you mean 'long'?"]),
        ({"constraint": "a&zz"}, ["constraint=a&zz", "no node has the feature 'zz'", "there are: a, b"]),
        ({"constraint": "a", "nodes": 3}, ["nodes=3 with constraint=a", "2 have these features", "Loosen constraint"]),
        ({"nodes": 1, "partition": "short"}, ["timeout_min=60", "30 minutes (MaxTime)", "Set timeout_min=30"]),
        ({"exclude": "node9"}, ["exclude=node9", "there is no node 'node9'"]),
        ({"exclude": "node1,node2,node3"}, ["nodes=2 with exclude=node1,node2,node3", "1 are left"]),
        ({"timeout_min": 3}, ["timeout_min=3", "signal_delay_s=180"]),
    ],
    ids=str,
)
def test_what_it_can_never_run_is_refused_with_a_way_out(changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ClusterError) as refusal:
        check(**changes)
    for text in told:
        assert text in str(refusal.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ClusterError, match=r"(?s)feature 'zz'.*account=nobody.*node 'node9'"):
        check(constraint="zz", account="nobody", exclude="node9")


@pytest.mark.parametrize(
    ("dependency", "told"),
    [
        ("afterok:404", "Slurm knows no job 404. It would take the dependency for met and start at once"),
        ("404", "Slurm knows no job 404"),
        ("afterok:7", "job 7 ended FAILED, and afterok wants it to end well"),
        ("afterany:7,afterok:8:7", "job 7 ended FAILED"),
        ("afternotok:8", "job 8 ended well"),
    ],
)
def test_a_dependency_that_can_never_be_met_is_refused(answering: Path, dependency: str, told: str) -> None:
    _know_jobs(answering)
    with pytest.raises(ClusterError) as refusal:
        check(dependency)
    assert f"dependency={dependency}: {told}" in str(refusal.value)
    with pytest.raises(ClusterError, match=r"dependency="):
        check(sbatch={"dependency": dependency})


@pytest.mark.parametrize(
    "dependency", ["afterok:8", "afterok:9+30", "afterany:7", "afternotok:7:9", "singleton", "9", "afterok:8?after:7"]
)
def test_a_dependency_that_is_or_can_be_met_is_accepted(answering: Path, dependency: str) -> None:
    _know_jobs(answering)
    check(dependency)


def test_nodes_that_are_down_now_are_a_warning_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    check(nodes=4)
    told = capsys.readouterr().err
    assert told.startswith("warning: 3 of the 4 nodes of partition 'low' can run a job now, 4 are asked for")
    assert "node4 IDLE+DRAIN bad memory" in told


def test_an_account_of_others_is_refused_where_slurm_enforces_it(answering: Path) -> None:
    (answering / "sacctmgr").write_text(
        '#!/bin/sh\ncase "$*" in *account*) echo vision ;; *qos*) echo "normal|" ;; esac\n'
    )
    check(account="vision")  # recorded with AccountingStorageEnforce = none
    config = recorded.read("config").replace("Enforce = none", "Enforce = associations,limits")
    (answering / "config").write_text(config)
    script = (answering / "scontrol").read_text().replace(f"{recorded.FOLDER}/config.txt", f"{answering}/config")
    (answering / "scontrol").write_text(script)
    with pytest.raises(ClusterError, match=r"account=vision: it exists, but is not yours; yours: none"):
        check(account="vision")


def test_where_slurm_cannot_be_asked_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check(nodes=500)
    assert (
        capsys.readouterr().err == "note: Slurm does not answer here, the request is not checked against the cluster\n"
    )


def _know_jobs(bin_dir: Path) -> None:
    for job_id, state in (("7", "FAILED"), ("8", "COMPLETED"), ("9", "RUNNING")):
        (bin_dir / f"job_{job_id}").write_text(f"JobId={job_id} JobName=x JobState={state} Reason=None Requeue=1\n")
