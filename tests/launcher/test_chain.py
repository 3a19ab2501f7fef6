"""Chains: one command for pre-train → fine-tune → evaluate; all of it is checked before any of it is submitted."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launcher.project import Project
from tests.launcher.test_submit import SLURM, _tool

FINE = "fine.yaml"


@pytest.fixture
def chains(project: Project) -> Project:
    """A project with a second recipe, validation shards, and a cluster file for Slurm."""
    runs = str(project.root / "runs")
    (project.root / FINE).write_text(yaml.safe_dump({"name": "fine", "output_dir": runs, "validation": "shards"}))
    (project.root / "slurm.yaml").write_text(yaml.safe_dump({**SLURM, "nodes": 2, "gpus_per_node": 0} | _RANKS))
    return project


_RANKS = {"ranks_per_node": 4}


def _run(project: Project, name: str) -> Path:
    return project.root / "runs" / name


def _submit(
    project: Project, *words: str, cluster: str = "cluster.yaml", environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return project.mvit("submit", "recipe.yaml", "--cluster", cluster, *words, environment=environment)


def _facts(run_dir: Path) -> list[dict]:
    path = run_dir / "facts_0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def _slurm(project: Project, sbatch: str) -> dict[str, str]:
    """Return an environment in which Slurm seems to be installed; submitted scripts are numbered from 1."""
    tools = project.root / "tools"
    count = f'cd {project.root}; n=$(($(ls script_* 2>/dev/null | wc -l) + 1)); cp "$1" script_$n'
    _tool(tools / "sbatch", f"{count}\n{sbatch}")
    _tool(tools / "srun", "exit 0")
    _tool(tools / "scancel", f'echo "$@" >> {project.root}/cancelled')
    _tool(tools / "squeue", "exit 0")
    environment = project.environment()
    return environment | {"PATH": f"{tools}:{environment['PATH']}"}


# --- on this machine --------------------------------------------------------------------------------------------


def test_a_chain_of_local_runs_trains_and_evaluates_one_after_the_other(chains: Project) -> None:
    result = _submit(chains, "steps=3", "--then", f"{FINE} steps=4", "--then-evaluate", "--follow")

    assert result.returncode == 0, result.stderr
    first, second = _run(chains, "trial"), _run(chains, "fine")
    assert [facts["weights"] for facts in _facts(first)] == [None]
    assert [facts["weights"] for facts in _facts(second)] == [str(first)]  # it looks that they are there
    assert yaml.safe_load((first / "config.yaml").read_text())["steps"] == 3
    assert yaml.safe_load((second / "config.yaml").read_text())["steps"] == 4
    found = json.loads((second / "evaluation.json").read_text())
    assert (found["step"], found["weights"], found["figures"]["top1"]) == (4, "averaged", 0.75)
    assert found["checkpoint"] == str(second / "checkpoints" / "step_00000004")
    assert not (first / "evaluation.json").exists()
    calls = [json.loads(line) for line in (second / "evaluated.jsonl").read_text().splitlines()]
    assert [call["ema"] for call in calls] == [True, True]  # by two ranks, once
    state = chains.mvit("status", str(second / "evaluation"), "--json")
    assert json.loads(state.stdout)["state"] == "finished"
    assert json.loads(state.stdout)["evaluation"]["top1"] == 0.75


def test_what_comes_after_a_failed_run_does_not_start_and_leaves_no_folder(chains: Project) -> None:
    result = _submit(chains, "raise_at=2", "--then", FINE, "--then-evaluate", "--follow")

    assert result.returncode == 1
    assert "ArithmeticError: the fault at step 2" in result.stderr
    assert f"not started, since the one before it is not finished (its folder is removed): {_run(chains, 'fine')}" in (
        result.stderr
    )
    assert [path.name for path in (chains.root / "runs").iterdir()] == ["trial"]


def test_local_chains_need_somebody_who_stays(chains: Project) -> None:
    result = _submit(chains, "--then", FINE)
    assert result.returncode == 1
    assert "add --follow" in result.stderr
    mixed = _submit(chains, "--then", f"{FINE} cluster.executor=slurm timeout_min=60", "--follow")
    assert "the jobs of a chain share one executor" in mixed.stderr
    assert not (chains.root / "runs").exists()


def test_a_run_can_start_from_one_that_was_finished_before(chains: Project) -> None:
    trial = str(_run(chains, "trial"))
    assert _submit(chains, "--follow").returncode == 0
    result = chains.mvit("submit", FINE, "--cluster", "cluster.yaml", "--after", trial, "--follow")
    assert result.returncode == 0, result.stderr
    assert [facts["weights"] for facts in _facts(_run(chains, "fine"))] == [trial]
    assert _events(_run(chains, "fine"))[0]["after"] == {"run_dir": trial, "job_id": None}


def test_a_run_that_is_stopped_or_still_runs_here_cannot_be_waited_for(chains: Project) -> None:
    _submit(chains, "steps=100000", "save_every=100000")
    chains.wait_for_training()
    after = ("submit", FINE, "--cluster", "cluster.yaml", "--after", str(_run(chains, "trial")))
    running = chains.mvit(*after)
    assert running.returncode == 1
    assert "only Slurm lets one job wait for another" in running.stderr
    chains.mvit("stop", str(_run(chains, "trial")), "--wait")
    stopped = chains.mvit(*after)
    assert stopped.returncode == 1
    assert "has to be finished first, but it is stopped" in stopped.stderr
    assert f"mvit resume {_run(chains, 'trial')}" in stopped.stderr
    assert not _run(chains, "fine").exists()


# --- before anything is submitted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--then", "recipe.yaml"], "would have the same run folder"),
        (["--then", f"{FINE} global_batch_size=7"], "global_batch_size=7 does not divide by 8 ranks"),
        (["--then", f"{FINE} shards=nowhere"], "data.train = nowhere"),
        (["--then", f"{FINE} num_classes=5"], "fine: num_classes=5, trial has 10"),
        (["--then", f"{FINE} nodes"], "write a recipe and its settings in one word"),
        (["--then", f"{FINE} validation=null", "--then-evaluate"], "--then-evaluate needs data.validation"),
        (["--after", "nowhere"], "is not a run folder"),
    ],
)
def test_whatever_is_wrong_with_any_link_is_told_before_the_first_is_submitted(
    chains: Project, words: list[str], told: str
) -> None:
    environment = _slurm(chains, 'echo "Submitted batch job $n"')
    result = _submit(chains, *words, cluster="slurm.yaml", environment=environment)
    assert result.returncode == 1
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (chains.root / "runs").exists()
    assert not list(chains.root.glob("script_*"))


def test_an_occupied_folder_of_a_later_run_is_told_before_the_first_is_submitted(chains: Project) -> None:
    _run(chains, "fine").mkdir(parents=True)
    (_run(chains, "fine") / "thesis.tex").write_text("precious")
    environment = _slurm(chains, 'echo "Submitted batch job $n"')
    result = _submit(chains, "--then", FINE, cluster="slurm.yaml", environment=environment)
    assert result.returncode == 1
    assert "it holds thesis.tex" in result.stderr
    assert not _run(chains, "trial").exists()
    assert not list(chains.root.glob("script_*"))


# --- what Slurm is told -----------------------------------------------------------------------------------------


def test_each_job_waits_for_the_one_before_and_goes_with_it(chains: Project) -> None:
    environment = _slurm(chains, 'echo "Submitted batch job 70$n"')
    words = ("--then", f"{FINE} ranks_per_node=2", "--then-evaluate", "partition=short", "--json")
    result = _submit(chains, *words, cluster="slurm.yaml", environment=environment)

    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [(run["job_id"], run["after"]) for run in runs] == [("701", None), ("702", "701"), ("703", "702")]
    assert [run["world_size"] for run in runs] == [8, 4, 2]
    evaluation = _run(chains, "fine") / "evaluation"
    assert [run["run_dir"] for run in runs] == [str(_run(chains, "trial")), str(_run(chains, "fine")), str(evaluation)]
    scripts = [(chains.root / f"script_{number}").read_text() for number in (1, 2, 3)]
    assert "--dependency" not in scripts[0]
    for script, before in zip(scripts[1:], ("701", "702"), strict=True):
        assert f"#SBATCH --dependency=afterok:{before}\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    for script, nodes in zip(scripts, (2, 2, 1), strict=True):
        assert f"#SBATCH --nodes={nodes}\n" in script
        assert "#SBATCH --partition=short\n" in script  # holds for all
    assert f"export PYTHONPATH={evaluation}/code" in scripts[2]
    assert (evaluation / "code").resolve() == (_run(chains, "fine") / "code").resolve()
    assert yaml.safe_load((_run(chains, "fine") / "config.yaml").read_text())["weights"] == str(_run(chains, "trial"))
    assert _events(evaluation)[0]["after"] == {"run_dir": str(_run(chains, "fine")), "job_id": "702"}


def test_weights_that_a_recipe_names_itself_are_left_alone(chains: Project) -> None:
    environment = _slurm(chains, 'echo "Submitted batch job $n"')
    words = ("--then", f"{FINE} model.weights=published.pyth", "--then", f"{FINE} name=scratch model.weights=null")
    result = _submit(chains, *words, cluster="slurm.yaml", environment=environment)
    assert result.returncode == 0, result.stderr
    saved = [yaml.safe_load((_run(chains, name) / "config.yaml").read_text()) for name in ("fine", "scratch")]
    assert [one["weights"] for one in saved] == ["published.pyth", None]


def test_a_dependency_of_the_cluster_file_is_waited_for_as_well(chains: Project) -> None:
    environment = _slurm(chains, 'echo "Submitted batch job $n"')
    words = ("--then", FINE, "cluster.sbatch.dependency=singleton")
    result = _submit(chains, *words, cluster="slurm.yaml", environment=environment)
    assert result.returncode == 0, result.stderr
    assert "--dependency=singleton\n" in (chains.root / "script_1").read_text()
    assert "--dependency=singleton,afterok:1\n" in (chains.root / "script_2").read_text()


def test_when_a_later_job_is_refused_the_earlier_are_cancelled_and_nothing_stays(chains: Project) -> None:
    refuse = 'if [ $n = 3 ]; then echo "sbatch: error: too many jobs" >&2; exit 1; fi; echo "Submitted batch job 70$n"'
    environment = _slurm(chains, refuse)
    result = _submit(chains, "--then", FINE, "--then-evaluate", cluster="slurm.yaml", environment=environment)
    assert result.returncode == 1
    assert "the submission was refused: sbatch: error: too many jobs" in result.stderr
    assert (chains.root / "cancelled").read_text().split() == ["702", "701"]
    assert list((chains.root / "runs").iterdir()) == []


def test_dry_run_shows_every_script_and_creates_nothing(chains: Project) -> None:
    result = _submit(chains, "--then", FINE, "--then-evaluate", "--dry-run", cluster="slurm.yaml")
    assert result.returncode == 0, result.stderr
    assert "# ----- 1 of 3: trial" in result.stdout
    assert "#SBATCH --dependency=afterok:ID_OF_JOB_1" in result.stdout
    assert "#SBATCH --dependency=afterok:ID_OF_JOB_2" in result.stdout
    assert "#SBATCH --job-name=fine-evaluation" in result.stdout
    assert result.stdout.count("#!/bin/bash") == 3
    assert not (chains.root / "runs").exists()


def test_a_run_that_never_started_waits_again_when_it_is_resumed(chains: Project) -> None:
    """The first run was stopped, so Slurm dropped the second: `mvit resume` of both makes the chain anew."""
    environment = _slurm(chains, 'echo "Submitted batch job 70$n"')
    assert _submit(chains, "--then", FINE, cluster="slurm.yaml", environment=environment).returncode == 0
    first, second = (_run(chains, name) for name in ("trial", "fine"))
    event = {"event": "end", "attempt": 1, "time": 1.0, "cause": "stopped", "detail": "told to stop", "requeued": False}
    with (first / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    refused = chains.mvit("resume", str(second), environment=environment)
    assert refused.returncode == 1
    assert f"{first} has to be finished first, but it is stopped (told to stop)" in refused.stderr

    assert chains.mvit("resume", str(first), environment=environment).returncode == 0
    body = 'printf "703|PENDING|None|N/A|\\n"'
    _tool(chains.root / "tools" / "squeue", f'case "$*" in *703*) {body};; esac')
    resumed = chains.mvit("resume", str(second), "--json", environment=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["after"] == "703"
    assert "--dependency=afterok:703\n" in (chains.root / "script_4").read_text()


def test_status_of_a_run_whose_chain_broke_says_so(chains: Project) -> None:
    environment = _slurm(chains, 'echo "Submitted batch job 70$n"')
    _submit(chains, "--then", FINE, "--then-evaluate", cluster="slurm.yaml", environment=environment)
    _tool(chains.root / "tools" / "scontrol", 'echo "JobId=$5 JobState=CANCELLED Reason=DependencyNeverSatisfied"')
    event = {"event": "end", "attempt": 1, "time": 1.0, "cause": "failed", "detail": "it broke", "requeued": False}
    with (_run(chains, "trial") / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    for folder in (_run(chains, "fine"), _run(chains, "fine") / "evaluation"):
        state = chains.mvit("status", str(folder), "--json", environment=environment)
        found = json.loads(state.stdout)
        assert found["state"] == "failed", found
        assert "the run it waited for did not finish" in found["detail"]
        assert "trial" in found["detail"]
