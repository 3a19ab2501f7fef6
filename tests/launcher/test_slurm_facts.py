"""Facts about a Slurm cluster: read as its commands print them, absent where nobody answers."""

import time
from pathlib import Path

import pytest

from launcher.slurm import (
    expand_hostlist,
    parse_accounting,
    parse_minutes,
    parse_nodes,
    parse_partitions,
    parse_seconds,
    parse_settings,
    read_slurm,
)
from tests.launcher import recorded


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put commands on PATH that answer as a real cluster did."""
    recorded.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def test_settings_keep_their_words_and_null_is_nothing(answering: Path) -> None:
    facts = read_slurm()
    assert facts is not None
    assert facts.setting("SLURM_VERSION") == "22.05.8"
    assert facts.setting("KillWait") == "3 sec"
    assert facts.setting("DependencyParameters") == ""  # (null)
    assert facts.setting("PowerPlugin") == ""  # nothing at all; the next line is not its value
    assert facts.setting("no such setting") == ""
    assert "cred_expire=5" in facts.setting("AuthInfo")


def test_partitions_have_limits_and_one_is_the_default() -> None:
    low, high, short = parse_partitions(recorded.read("partition"))
    assert (low.name, low.is_default, low.state, low.preempt_mode, low.grace_time_s) == (
        "low",
        True,
        "UP",
        "REQUEUE",
        20,
    )
    assert (low.max_nodes, low.max_time_min, low.max_cpus_per_node, low.max_mem_mb) == (None, None, None, None)
    assert (high.is_default, high.preempt_mode) == (False, "OFF")
    assert (short.max_nodes, short.max_time_min) == (1, 30)


def test_nodes_have_sizes_features_and_a_reason_not_to_be_used(answering: Path) -> None:
    facts = read_slurm()
    assert facts is not None
    node1 = next(node for node in facts.nodes if node.name == "node1")
    node4 = next(node for node in facts.nodes if node.name == "node4")
    assert (node1.cpus, node1.memory_mb, node1.gpus, node1.features) == (2, 4000, 2, ("a",))
    assert node1.is_usable
    assert not node4.is_usable
    assert (node4.states, node4.reason.split(" [")[0]) == (("IDLE", "DRAIN"), "bad memory")
    assert sorted(node.name for node in facts.nodes_of("short")) == ["node1", "node2"]


@pytest.mark.parametrize(
    ("line", "gpus"),
    [
        ("Gres=gpu:2", 2),
        ("Gres=gpu:a100:8(S:0-1)", 8),
        ("Gres=nvme:1,gpu:h100:4(S:0),gpu:a40:2(S:1)", 6),
        ("Gres=(null) CfgTRES=cpu=96,mem=1000G,billing=96,gres/gpu=8,gres/gpu:h200=8", 8),
        ("Gres=(null) CfgTRES=cpu=96", 0),
        ("Gres=mps:400", 0),
    ],
)
def test_gpus_are_counted_however_they_are_written(line: str, gpus: int) -> None:
    assert parse_nodes(f"NodeName=n CPUTot=96 {line} State=IDLE")[0].gpus == gpus


@pytest.mark.parametrize(
    ("state", "is_usable"),
    [
        ("IDLE", True),
        ("MIXED+PLANNED", True),
        ("IDLE+CLOUD+POWERED_DOWN", True),  # it is booted for the job
        ("DOWN*", False),
        ("IDLE*", False),  # does not respond
        ("DOWN+NOT_RESPONDING", False),
        ("IDLE+DRAIN", False),
        ("ALLOCATED+DRAIN", False),
        ("IDLE+MAINT+RESERVED", False),
        ("FAIL", False),
    ],
)
def test_a_node_is_usable_unless_a_state_forbids_it(state: str, is_usable: bool) -> None:
    assert parse_nodes(f"NodeName=n State={state} Reason=a few words=x [root@now]")[0].is_usable is is_usable


def test_accounts_and_qos_are_those_that_exist_and_those_of_the_user() -> None:
    found = parse_accounting(recorded.read("account"), recorded.read("qos"), recorded.read("assoc"))
    assert found.accounts == ("root", "test")
    assert found.own_accounts == ("test", "root")
    assert found.own_qos == ("normal",)
    assert found.qos_flags == {"normal": (), "long": ("DenyOnLimit", "PartitionTimeLimit")}


def test_without_accounting_nobody_asks_for_accounts(answering: Path) -> None:
    config = recorded.read("config").replace("accounting_storage/slurmdbd", "accounting_storage/none")
    (answering / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{config}\nEND\n")
    facts = read_slurm()
    assert facts is not None
    assert not facts.has_accounting
    assert facts.accounting is None


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("UNLIMITED", None), ("00:30:00", 30), ("2-00:00:00", 2880), ("1-01:30:30", 1530.5), ("05:30", 5.5)],
)
def test_time_limits_become_minutes(text: str, minutes: float | None) -> None:
    assert parse_minutes(text) == minutes


def test_durations_become_seconds() -> None:
    assert [parse_seconds(text) for text in ("30 sec", "2 min", "120", "UNLIMITED", "")] == [30, 120, 120, None, None]


def test_settings_of_a_text_without_any_are_empty() -> None:
    assert parse_settings("slurm_load_ctl_conf error: Unable to contact slurm controller\n") == {}


def test_where_slurm_is_not_installed_there_are_no_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_slurm() is None
    assert expand_hostlist("node1") is None


def test_a_controller_that_does_not_answer_is_asked_once_and_not_for_long(
    answering: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.slurm.TIMEOUT_S", 0.5)
    (answering / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    start = time.monotonic()
    assert read_slurm() is None
    assert time.monotonic() - start < 5
