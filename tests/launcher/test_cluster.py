"""Cluster files: what is derived, and that each mistake is named with its key, its value and a way out."""

from pathlib import Path

import pytest

from launcher import cluster as cluster_module
from launcher.cluster import ClusterError, Placement, load_cluster, parse_cluster, place

SLURM = {"executor": "slurm", "nodes": 2, "gpus_per_node": 8, "timeout_min": 60}
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).executor in ("local", "slurm")


def test_slurm_runs_one_rank_per_gpu() -> None:
    placement = place(parse_cluster(SLURM, "file"))
    assert placement == Placement(nodes=2, ranks_per_node=8, gpus_per_node=8)
    assert placement.world_size == 16


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "expected"),
    [
        (4, [], Placement(1, 4, 4)),
        (0, [], Placement(1, 2, 0)),
        (4, ["ranks_per_node=2"], Placement(1, 2, 2)),
        (4, ["gpus_per_node=1"], Placement(1, 1, 1)),
        (4, ["gpus_per_node=0", "ranks_per_node=3"], Placement(1, 3, 0)),
        (0, ["ranks_per_node=1"], Placement(1, 1, 0)),
    ],
)
def test_local_takes_the_gpus_there_are_and_two_cpu_ranks_without(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, overrides: list[str], expected: Placement
) -> None:
    monkeypatch.setattr(cluster_module, "count_gpus", lambda: num_gpus)
    auto = {"executor": "local", "gpus_per_node": "auto", "ranks_per_node": "auto"}
    assert place(parse_cluster(auto, "file", overrides)) == expected


def test_asking_for_gpus_that_are_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "count_gpus", lambda: 0)
    with pytest.raises(ClusterError, match=r"gpus_per_node=2, but this machine shows 0 GPU\(s\).*gpus_per_node=0"):
        place(parse_cluster({"executor": "local", "gpus_per_node": 2}, "file"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partitoin": "a"}, r"unknown key 'partitoin': did you mean partition\?"),
        ({"executor": "slrum"}, r"executor='slrum'.*'local' or 'slurm'"),
        ({"nodes": 0}, "nodes=0: Input should be greater than 0"),
        ({"timeout_min": None}, "timeout_min is missing"),
        ({"timeout_min": 4}, "timeout_min=4 .240 s. leaves no time to train.*signal_delay_s=180 s before .*240 s in"),
        ({"mem": 100}, r"mem=100: sbatch reads .* as megabytes, so this is 100 MB .* Set mem=100G .*mem=100M"),
        ({"mem": "64"}, "mem=64: .*Set mem=64G"),
        ({"mem": True}, "mem=True: Input should be a valid string"),
        ({"ranks_per_node": 4}, "ranks_per_node=4 contradicts gpus_per_node=8"),
        ({"gpus_per_node": "auto"}, "cannot be counted from here"),
        ({"gpus_per_node": 0}, "ranks_per_node=auto with gpus_per_node=0"),
        ({"sbatch": {"time": "1:00"}}, "sbatch.time is set by this project: use timeout_min"),
        ({"sbatch": {"exclusive": False}}, "sbatch.exclusive=false"),
        ({"executor": "local", "nodes": 2}, "nodes=2 with executor=local"),
        ({"executor": "local", "nodes": 1, "partition": "a"}, "partition has no meaning with executor=local"),
    ],
)
def test_a_wrong_cluster_file_is_named_with_key_and_way_out(change: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as error:
        parse_cluster({**SLURM, **change}, "my_cluster.yaml")
    assert str(error.value).startswith("my_cluster.yaml: ")


@pytest.mark.parametrize(("lead", "least"), [(180, 5), (179, 4), (181, 5), (60, 3), (10, 2)])
def test_the_time_limit_that_a_refusal_names_works(lead: int, least: int) -> None:
    settings = SLURM | {"signal_delay_s": lead}
    with pytest.raises(ClusterError, match=f"Set timeout_min={least} at least"):
        parse_cluster(settings | {"timeout_min": least - 1}, "file")
    parse_cluster(settings | {"timeout_min": least}, "file")


@pytest.mark.parametrize(
    ("given", "meant"), [(0, "0"), ("0", "0"), (64000, "64000"), ("64000", "64000"), ("100M", "100M"), ("9G", "9G")]
)
def test_memory_that_can_be_meant_is_given_to_sbatch_as_it_stands(given: object, meant: str) -> None:
    assert parse_cluster(SLURM | {"mem": given}, "file").mem == meant
    assert parse_cluster(SLURM, "file", [f"mem={given}"]).mem == meant


def test_a_missing_cluster_file_is_answered_with_the_ones_there_are(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").touch()
    with pytest.raises(ClusterError, match=r"did you mean .*local\.yaml\?"):
        load_cluster(tmp_path / "locla.yaml")


def test_an_override_changes_a_nested_setting(tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    path.write_text("executor: slurm\ngpus_per_node: 8\ntimeout_min: 60\nsbatch: {exclusive: true}\n")
    changed = load_cluster(path, ["nodes=4", "sbatch.mail-type=END"])
    assert changed.nodes == 4
    assert changed.sbatch == {"exclusive": True, "mail-type": "END"}
