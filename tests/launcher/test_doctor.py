"""The doctor without a cluster: verdicts on settings, on saves and space, on the reports of ranks; a real local job."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from launcher.cluster import Placement, parse_cluster
from launcher.disk_speed import existing_parent, read_speed, write_speed
from launcher.doctor_report import Finding, NodesReport, NodeVerdict, Report, verdict_line
from launcher.doctor_settings import StopTime, granularity_finding, lead_finding, slurm_findings
from launcher.doctor_verdict import RankEnd, judge
from launcher.slurm import SlurmFacts, parse_nodes, parse_partitions, parse_settings
from tests.launcher import recorded
from tests.launcher.project import ROOT, wait_until
from tests.launcher.written import create, event

SLURM = {"executor": "slurm", "nodes": 2, "gpus_per_node": 2, "timeout_min": 60}
STOP = StopTime(10.0, 1.0, "measured")
LOCAL = "executor: local\nranks_per_node: 2\ngpus_per_node: 0\n"


def findings(stop: StopTime | None = STOP, partition: str = "low", **changed: str) -> dict[str, Finding]:
    """Judge the recorded cluster with some settings of scontrol's changed."""
    settings = parse_settings(recorded.read("config")) | changed
    partitions = parse_partitions(recorded.read("partition"))
    facts = SlurmFacts(settings, partitions, parse_nodes(recorded.read("node")), None)
    found = slurm_findings(facts, parse_cluster(SLURM, "test"), facts.partition(partition), stop)
    return {finding.check: finding for finding in found}


def test_a_cluster_that_suits_long_runs_has_no_fail() -> None:
    assert {finding.level for finding in findings().values()} == {"PASS", "WARN"}
    assert findings(PreemptType="preempt/none")["preemption"].level == "PASS"
    assert "preemption signal" not in findings(partition="high")  # PreemptMode=OFF there


@pytest.mark.parametrize(
    ("changed", "check", "told"),
    [
        ({"SlurmctldParameters": "(null)"}, "preemption signal", "preempt_send_user_signal is off"),
        ({"AuthInfo": "socket=/run/munge,cred_expire=600"}, "requeue delay", "waits 601 s"),
        ({"KillWait": "3 sec"}, "KillWait", "30 is usual"),
        ({"SlurmdTimeout": "0 sec"}, "SlurmdTimeout", "never noticed"),
        ({"SlurmdTimeout": "3600 sec"}, "SlurmdTimeout", "after 3600 s"),
        ({"OverTimeLimit": "UNLIMITED"}, "OverTimeLimit", "never ended by its time limit"),
        ({"ProctrackType": "proctrack/pgid"}, "ProctrackType", "may outlive its job"),
        ({"SLURM_VERSION": "19.05.3"}, "Slurm", "19.05.3"),
        ({"AccountingStorageType": "accounting_storage/slurmdbd"}, "accounting", "slurmdbd does not answer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_setting_that_costs_time_is_a_warning_with_a_reason(changed: dict[str, str], check: str, told: str) -> None:
    finding = findings(**changed)[check]
    assert finding.level == "WARN"
    assert told in str(finding)


def test_settings_that_help_are_passes() -> None:
    found = findings(
        PreemptParameters="send_user_signal",
        SlurmctldParameters="(null)",
        ProctrackType="proctrack/cgroup",
        AuthInfo="(null)",
        AccountingStorageType="accounting_storage/none",
    )
    for check in ("preemption signal", "ProctrackType", "requeue delay", "accounting"):
        assert found[check].level == "PASS", found[check]
    assert found["requeue delay"].found == "cred_expire=120 s (the default)"


def test_a_preempted_partition_warns_of_what_preemption_does() -> None:
    text = recorded.read("partition").replace("PreemptMode=REQUEUE", "PreemptMode=CANCEL")
    facts = SlurmFacts(parse_settings(recorded.read("config")), parse_partitions(text), (), None)
    found = {f.check: f for f in slurm_findings(facts, parse_cluster(SLURM, "test"), facts.partition("low"), STOP)}
    assert "cancelled, not requeued" in found["preemption"].why
    slow = StopTime(90.0, 2.0, "measured")  # GraceTime is 20 s
    assert findings(slow)["grace time"].level == "WARN"
    assert findings(slow)["grace time"].way_out.startswith("An administrator sets it in slurm.conf: GraceTime=130")


@pytest.mark.parametrize(("lead", "level"), [(5, "FAIL"), (11, "WARN"), (60, "WARN"), (71, "PASS"), (300, "PASS")])
def test_the_signal_must_lead_by_a_save_a_step_and_a_minute(lead: int, level: str) -> None:
    finding = lead_finding(parse_cluster(SLURM | {"signal_delay_s": lead}, "test"), STOP)
    assert finding.level == level
    assert ("Set signal_delay_s=80." in finding.way_out) is (level != "PASS")
    assert lead_finding(parse_cluster(SLURM, "test"), None).level == "WARN"


def test_a_life_that_is_short_beside_its_lead_is_a_warning() -> None:
    assert granularity_finding(parse_cluster(SLURM, "test")).level == "PASS"
    short = granularity_finding(parse_cluster(SLURM | {"timeout_min": 10}, "test"))
    assert (short.level, "40%" in short.why) == ("WARN", True)


def test_a_file_system_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "not" / "yet") == tmp_path
    assert write_speed(tmp_path, 1 << 20, 5.0) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert read_speed(tmp_path / "file", 1 << 20) > 0


def report(rank: int, node: str, errors: dict[str, str] | None = None, done: bool = True, **figures: Any) -> dict:
    """Return what a healthy rank with one GPU reports, with some figures changed."""
    healthy = {
        "versions": {"python": "3.11.7", "torch": "2.11"},
        "visible": [f"{node}-gpu0", f"{node}-gpu1"],
        "device": f"{node}-gpu{rank % 2}",
        "name": "H100",
        "gpu_free_gib": 79.0,
        "gpu_total_gib": 80.0,
        "shm_gib": 100.0,
        "free_gib": 900.0,
        "finite": True,
        "repeatable": True,
        "right": True,
        "sum_right": True,
        "tflops": 700.0,
        "allreduce_gb_s": 300.0,
        "read_mb_s": 1000.0,
        "clock_ms": 0.1,
    }
    return {"rank": rank, "node": node, "done": done, "errors": errors or {}, "figures": healthy | figures}


def healthy() -> list[dict]:
    return [report(rank, f"node{rank // 2 + 1}", write_mb_s=500.0) for rank in range(6)]


PLACEMENT = Placement(nodes=3, ranks_per_node=2, gpus_per_node=2)


def judged(change: Callable[[list[dict]], object]) -> tuple[NodeVerdict, ...]:
    reports = healthy()
    change(reports)
    return judge(reports, PLACEMENT, ["node1", "node2", "node3"], {})


def test_healthy_nodes_pass_with_the_figures_of_their_weakest_rank() -> None:
    verdicts = judged(lambda reports: reports[3]["figures"].update(tflops=650.0))
    assert [(v.node, v.level, v.problems) for v in verdicts] == [(f"node{n}", "PASS", ()) for n in (1, 2, 3)]
    assert verdicts[1].figures["tflops"] == 650.0
    assert verdicts[1].figures["gpus"] == 2


@pytest.mark.parametrize(
    ("wrong", "level", "told"),
    [
        ({"right": False}, "FAIL", "rank 3: a matrix product with a known answer is wrong"),
        ({"repeatable": False}, "FAIL", "different bits"),
        ({"finite": False}, "FAIL", "not finite"),
        ({"sum_right": False}, "FAIL", "the sum over all ranks is wrong"),
        ({"tflops": 450.0}, "WARN", "450 TFLOP/s, 0.64 of the median"),
        ({"tflops": 200.0}, "FAIL", "0.29 of the median"),
        ({"versions": {"python": "3.12.1", "torch": "2.11"}}, "FAIL", "python 3.12.1 (others 3.11.7)"),
        ({"read_mb_s": 100.0}, "WARN", "reads shards with 100 MB/s, the median is 1000"),
        ({"clock_ms": 5000.0}, "WARN", "differs from rank 0's by 5.0 s"),
        ({"clock_ms": -120e3}, "FAIL", "by 120.0 s"),
        ({"shm_gib": 0.0625}, "WARN", "/dev/shm has 64 MiB"),
        ({"gpu_free_gib": 20.0}, "WARN", "60.0 of 80.0 GiB of its GPU are taken"),
        ({"device": "node2-gpu0"}, "FAIL", "2 ranks drive 1 GPU(s)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_a_rank_is_its_node_s_alone(wrong: dict[str, Any], level: str, told: str) -> None:
    verdicts = judged(lambda reports: reports[3]["figures"].update(wrong))
    assert [verdict.level for verdict in verdicts] == ["PASS", level, "PASS"]
    assert told in " ".join(verdicts[1].problems)


def test_a_slow_cpu_is_a_warning_since_others_may_use_it() -> None:
    def share(reports: list[dict]) -> None:
        for one in reports:
            del one["figures"]["gpu_total_gib"]
        reports[3]["figures"]["tflops"] = 70.0

    verdict = judged(share)[1]
    assert "rank 3: 70 TFLOP/s, 0.10 of the median of all ranks" in verdict.problems
    assert verdict.level == "WARN"


def test_a_node_with_fewer_gpus_than_asked_for_fails() -> None:
    def lose(reports: list[dict]) -> None:
        for one in reports[2:4]:
            one["figures"]["visible"] = ["node2-gpu0"]

    verdicts = judged(lose)
    assert verdicts[1].problems[0] == "its ranks see 1 GPU(s), gpus_per_node=2"
    assert [verdict.level for verdict in verdicts] == ["PASS", "FAIL", "PASS"]


def test_an_absent_rank_fails_its_node_and_not_those_that_waited_for_it() -> None:
    waited = {"network": "DistStoreError: timed out"}
    reports = [report(rank, f"node{rank // 2 + 1}", errors=waited) for rank in range(6)]
    verdicts = judge(
        [*reports[:2], *reports[4:]], PLACEMENT, ["node1", "node2", "node3"], {2: RankEnd("killed by SIGKILL")}
    )
    assert [(verdict.node, verdict.level) for verdict in verdicts] == [
        ("node1", "WARN"),
        ("node2", "FAIL"),
        ("node3", "WARN"),
    ]
    assert verdicts[1].problems == (
        "rank 2 left no report: killed by SIGKILL",
        "rank 3 left no report: it never started",
    )
    assert "since rank 2 was absent" in verdicts[0].problems[0]


def test_a_rank_that_is_killed_fails_its_node_and_not_those_that_were_ended_for_it() -> None:
    cut = {"arithmetic": "was not finished"}
    reports = [report(rank, f"node{rank // 2 + 1}", errors=cut, done=False) for rank in range(5)]
    ends = {rank: RankEnd("ended because rank 3 failed", for_another=True) for rank in range(6)}
    verdicts = judge(reports, PLACEMENT, [], ends | {3: RankEnd("killed by SIGSEGV")})
    assert [verdict.level for verdict in verdicts] == ["WARN", "FAIL", "WARN"]
    assert verdicts[1].problems[0] == "rank 3: arithmetic: was not finished (killed by SIGSEGV)"
    assert verdicts[2].problems[1].startswith("rank 4: arithmetic was not finished: ended because rank 3")


def test_a_node_whose_torch_cannot_be_imported_is_the_one_that_fails() -> None:
    reports = [report(rank, f"node{rank // 2 + 1}", errors={"network": "timed out"}) for rank in range(6)]
    reports[5] = report(5, "node3", errors={"devices": "ImportError: libcudart", "network": "ImportError: libcudart"})
    verdicts = judge(reports, PLACEMENT, [], {})
    assert [verdict.level for verdict in verdicts] == ["WARN", "WARN", "FAIL"]
    assert "rank 5: devices: ImportError: libcudart" in verdicts[2].problems


def test_a_network_that_fails_with_everybody_there_fails_everywhere() -> None:
    reports = [report(rank, f"node{rank // 2 + 1}", errors={"network": "timed out"}) for rank in range(6)]
    assert [verdict.level for verdict in judge(reports, PLACEMENT, [], {})] == ["FAIL"] * 3


def test_one_fail_anywhere_is_a_fail_of_the_whole() -> None:
    good, bad = Finding("a", "WARN", "x"), Finding("b", "FAIL", "y")
    nodes = NodesReport("folder", "7", (NodeVerdict("node1", "FAIL", {}),))
    assert Report((good,), "").ok
    assert not Report((good, bad), "").ok
    assert not Report((good,), "", nodes).ok
    assert json.loads(json.dumps(Report((good,), "s", nodes).to_dict()))["nodes"]["nodes"][0]["level"] == "FAIL"
    assert "node1  FAIL" in str(nodes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Path) -> Path:
    """Return a folder with a recipe and the cluster file of two CPU ranks, and work there."""
    recipe = yaml.safe_load((ROOT / "configs" / "demo" / "digits.yaml").read_text())
    recipe["data"] |= {"train": str(digits / "train"), "validation": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "local.yaml").write_text(LOCAL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_s_checkpoints_are_compared_with_the_space_and_the_lead(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lead, too short for the save that the given run measured, fails; the prediction without a run does not."""
    arguments = ["doctor", "recipe.yaml", "--cluster", "local.yaml", "timeout_min=5", "signal_delay_s=20", "--json"]
    assert main(arguments) == 0
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert "predicted size / speed measured now" in found["signal lead"]["why"]
    assert "keep_last=2" in found["space"]["why"]
    assert "2 ranks = 64 samples" in found["batch"]["found"]

    run = here / "runs" / "old"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    lines = [{"kind": "train", "step": 1, "step_seconds": 2.0}, {"kind": "save", "step": 2, "seconds": 30.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "sa')
    assert main([*arguments, "--run", "runs/old"]) == 1
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["signal lead"]["level"] == "FAIL"
    assert "A save takes 30.0 s and a step 2.0 s (the slowest of 1 save(s)" in found["signal lead"]["why"]
    assert found["signal lead"]["way_out"] == "Set signal_delay_s=100."


def test_settings_of_a_recipe_without_one_and_a_run_that_is_none_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "optim.lr=1", "--cluster", "local.yaml"]) == 1
    assert "no RECIPE is given" in capsys.readouterr().err
    assert main(["doctor", "--cluster", "local.yaml", "--run", "nowhere"]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_without_slurm_the_doctor_of_a_slurm_cluster_says_so_and_fails(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "slurm.yaml").write_text(yaml.safe_dump(SLURM))
    monkeypatch.setenv("PATH", str(here))
    assert main(["doctor", "--cluster", "slurm.yaml", "--submit"]) == 1
    told = capsys.readouterr()
    assert "FAIL  Slurm: no answer" in told.out
    assert "nothing was submitted" in told.err


def test_what_is_bad_stands_at_the_end_beside_the_verdict_and_the_script_is_shown_on_request(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "slurm.yaml").write_text(yaml.safe_dump(SLURM))
    monkeypatch.setenv("PATH", str(here))
    assert main(["doctor", "--cluster", "slurm.yaml"]) == 1
    short = capsys.readouterr().out
    levels = [line.split()[0] for line in short.splitlines() if not line.startswith(" ")]
    assert levels == ["PASS", "PASS", "WARN", "FAIL", "FAIL:"]
    assert short.endswith("FAIL: 2 PASS, 1 WARN, 1 FAIL\n")
    assert "#SBATCH" not in short
    assert main(["doctor", "--cluster", "slurm.yaml", "--script"]) == 1
    whole = capsys.readouterr().out
    assert whole.index("#SBATCH --nodes=2") < whole.index("PASS  output_dir") < whole.index("FAIL: 2 PASS")


def test_a_run_folder_that_a_submission_would_refuse_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def look(*more: str) -> tuple[int, dict]:
        code = main(["doctor", "recipe.yaml", "--cluster", "local.yaml", "--json", *more])
        findings = json.loads(capsys.readouterr().out)["findings"]
        return code, next(one for one in findings if one["check"] == "run folder")

    folder = here / "runs" / "digits"
    assert look() == (
        0,
        {"check": "run folder", "level": "PASS", "found": f"{folder} is free", "why": "", "way_out": ""},
    )
    run = create(folder)
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    code, found = look()
    assert (code, found["level"]) == (1, "FAIL")
    assert f"mvit resume {folder}" in found["why"]
    code, found = look("--run", str(folder))  # it is to be continued
    assert (code, found["level"]) == (0, "PASS")
    (folder / "checkpoints" / "step_00000002").rmdir()
    event(run, "end", 1, 0, cause="failed", detail="broke", requeued=False)
    code, found = look()
    assert (code, found["found"]) == (0, f"{folder} holds a run that never saved")


def test_a_local_job_measures_both_ranks_and_finds_the_one_that_computes_wrongly(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "local.yaml").write_text(LOCAL + "env: {MVIT_DOCTOR_FAULT: gemm@1}\n")
    assert main(["doctor", "recipe.yaml", "--cluster", "local.yaml", "--submit", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (node,) = told["nodes"]["nodes"]
    assert node["level"] == "FAIL"
    assert node["problems"][0] == "rank 1: a matrix product with a known answer is wrong"
    for figure in ("tflops", "allreduce_gb_s", "read_mb_s", "write_mb_s", "free_gib"):
        assert node["figures"][figure] > 0
    folder = Path(told["nodes"]["folder"])
    assert folder.parent == here / "runs"
    ranks = [json.loads((folder / f"rank_000{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["figures"]["right"] for rank in ranks] == [True, False]
    assert all(rank["figures"]["repeatable"] and rank["figures"]["sum_right"] for rank in ranks)
    assert json.loads((folder / "report.json").read_text())["nodes"] == told["nodes"]["nodes"]


def test_ctrl_c_ends_the_job_too(here: Path) -> None:
    doctor = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "doctor", "--cluster", "local.yaml", "--submit"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def pids() -> list[int]:
        return [json.loads(file.read_text())["pid"] for file in here.glob("runs/doctor-*/logs/*/rank_*.json")]

    wait_until(lambda: len(pids()) == 2)
    doctor.send_signal(signal.SIGINT)
    assert "error: interrupted" in doctor.communicate(timeout=30)[1]
    assert doctor.returncode == 130
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids()))


def test_the_verdict_counts_the_nodes_too() -> None:
    findings = (Finding("batch", "PASS", "fine"), Finding("space", "WARN", "little"))
    nodes = NodesReport("f", "7", (NodeVerdict("node1", "PASS", {}), NodeVerdict("node2", "FAIL", {}, ("slow",))))
    assert verdict_line(Report(findings, "")) == "OK: 1 PASS, 1 WARN"
    assert verdict_line(Report(findings, "", nodes)) == "FAIL: 1 PASS, 1 WARN; nodes: 1 PASS, 1 FAIL"
