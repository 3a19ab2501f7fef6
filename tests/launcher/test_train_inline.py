"""`mvit train` in one process: stops that lose nothing, failures that are recorded, folders that are not taken over."""

import json
import signal

import pytest

from launcher.claims import claim_life
from tests.launcher.project import Project, wait_until


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_85_and_resume_continues(project: Project, signum: signal.Signals) -> None:
    process = project.start("train", "recipe.yaml", "steps=60", "save_every=1000")
    project.wait_for_training(num_ranks=1)
    running = project.status()
    assert (running["state"], running["executor"]) == ("running", "inline")
    process.send_signal(signum)
    process.communicate(timeout=30)

    assert process.returncode == 85
    state = project.status()
    assert state["state"] == "stopped"
    assert 0 < state["checkpoint_step"] == state["step"] < 60
    resumed = project.mvit("resume", str(project.run_dir))
    assert resumed.returncode == 0, resumed.stderr
    assert [facts["first_step"] for facts in project.facts(0)] == [0, state["step"]]
    assert project.status()["state"] == "finished"


def test_train_with_resume_starts_a_run_or_continues_it(project: Project) -> None:
    first = project.mvit("train", "recipe.yaml", "raise_at=4", "--resume")
    assert first.returncode == 1
    assert "Traceback" in first.stderr  # a fault of the program, not of its user
    assert "ArithmeticError: the fault at step 4" in first.stderr
    state = project.status()
    assert (state["state"], state["detail"]) == ("failed", "ArithmeticError: the fault at step 4")

    assert project.mvit("train", "recipe.yaml").returncode == 1  # without --resume: refused
    second = project.mvit("train", "recipe.yaml", "--resume")
    assert second.returncode == 0, second.stderr
    assert [facts["first_step"] for facts in project.facts(0)] == [0, 2]


def test_a_killed_process_is_seen_as_failed(project: Project) -> None:
    process = project.start("train", "recipe.yaml", "steps=100000")
    project.wait_for_training(num_ranks=1)
    process.kill()
    process.communicate()
    wait_until(lambda: project.status()["state"] == "failed", timeout=10)
    shown = json.loads(project.mvit("status", str(project.run_dir), "--json").stdout)
    assert shown == project.status()
    assert "gone without a final record" in shown["detail"]


def test_stop_reaches_a_run_of_mvit_train(project: Project) -> None:
    process = project.start("train", "recipe.yaml", "steps=100000")
    project.wait_for_training(num_ranks=1)
    assert project.mvit("stop", str(project.run_dir), "--wait").returncode == 0
    process.communicate(timeout=30)
    assert process.returncode == 85


def test_a_run_that_a_later_life_takes_over_says_so_and_writes_nothing_more(project: Project) -> None:
    process = project.start("train", "recipe.yaml", "steps=100000")
    project.wait_for_training(num_ranks=1)
    events = project.events()
    claim_life(project.run_dir, 2)  # `mvit resume` on another host, which took this one for dead
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 87, errors
    assert f"life 2 of {project.run_dir} has taken over" in errors
    assert "Traceback" not in errors
    assert project.events() == events
    assert not list(project.run_dir.glob("logs/*/*.error.json"))
