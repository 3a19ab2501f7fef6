"""What the local executor promises: a job ends as a whole, says why, saves when asked, and leaves nothing behind."""

import os
import signal
import time

import psutil

from tests.launcher.project import Project, wait_until

LONG = ("steps=100000", "step_s=0.05")


def test_a_job_trains_on_all_ranks_and_follow_shows_it_to_the_end(project: Project) -> None:
    result = project.submit(follow=True)

    assert result.returncode == 0, result.stderr
    assert "step 5/5  loss 0.2000" in result.stdout
    assert "evaluate at step 5: top1 0.75" in result.stdout
    state = project.status()
    assert (state["state"], state["step"], state["attempt"]) == ("finished", 5, 1)
    for rank in (0, 1):
        facts = project.facts(rank)[0]
        assert (facts["WORLD_SIZE"], facts["LOCAL_RANK"]) == ("2", str(rank))
        log = project.run_dir / "logs" / "attempt_001" / f"rank_{rank:04d}.log"
        assert f"rank {rank} of 2 trains from step 0" in log.read_text()
    assert project.facts(0)[0]["MASTER_PORT"] == project.facts(1)[0]["MASTER_PORT"]
    assert [event["event"] for event in project.events()] == ["submit", "start", "end"]


def test_a_killed_rank_ends_the_job_within_seconds_and_its_signal_is_named(project: Project) -> None:
    follower = project.start("submit", "recipe.yaml", "--cluster", "cluster.yaml", "--follow", *LONG)
    pids = project.wait_for_training()
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    _, errors = follower.communicate(timeout=30)

    assert time.monotonic() - start < 10
    assert follower.returncode == 1
    assert f"(pid {pids[1]}) died: killed by SIGKILL" in errors
    assert "rank 1 on " in errors
    state = project.status()
    assert state["state"] == "failed"
    assert f"(pid {pids[1]}) died: killed by SIGKILL" in state["detail"]
    wait_until(lambda: not project.processes(), timeout=10)


def test_a_rank_that_raises_ends_the_job_and_follow_prints_its_traceback(project: Project) -> None:
    result = project.submit("raise_at=3", "raise_on_rank=1", "steps=100000", follow=True)

    assert result.returncode == 1
    assert "raised ArithmeticError: the fault at step 3" in result.stderr
    assert 'raise ArithmeticError(f"the fault at step {step}")' in result.stderr  # the line of code
    assert "Traceback (most recent call last)" in result.stderr
    log = project.run_dir / "logs" / "attempt_001" / "rank_0001.log"
    assert "ArithmeticError: the fault at step 3" in log.read_text()
    wait_until(lambda: not project.processes(), timeout=10)


def test_ranks_that_cannot_even_start_are_a_failure_with_their_own_words(project: Project) -> None:
    result = project.submit("cluster.env.PYTHONHOME=/nowhere", follow=True)

    assert result.returncode == 1
    assert project.status()["state"] == "failed"
    assert "ModuleNotFoundError: No module named 'encodings'" in result.stderr


def test_a_stopped_job_saves_exits_85_and_resume_continues_where_it_stopped(project: Project) -> None:
    follower = project.start(
        "submit", "recipe.yaml", "--cluster", "cluster.yaml", "--follow", "steps=40", "save_every=1000"
    )
    project.wait_for_training()
    stopped = project.mvit("stop", str(project.run_dir), "--wait")
    output, _ = follower.communicate(timeout=30)

    assert stopped.returncode == 0, stopped.stderr
    assert follower.returncode == 85
    assert "mvit resume" in output
    state = project.status()
    assert state["state"] == "stopped"
    assert 0 < state["step"] < 40
    assert state["checkpoint_step"] == state["step"]  # nothing was lost

    resumed = project.mvit("resume", str(project.run_dir), "--follow")
    assert resumed.returncode == 0, resumed.stderr
    assert [facts["first_step"] for facts in project.facts(0)] == [0, state["step"]]
    final = project.status()
    assert (final["state"], final["step"], final["attempt"]) == ("finished", 40, 2)


def test_usr2_to_the_ranks_stops_the_job_like_a_stop_command(project: Project) -> None:
    project.submit(*LONG)
    for pid in project.wait_for_training():
        os.kill(pid, signal.SIGUSR2)
    wait_until(lambda: project.status()["state"] == "stopped", timeout=15)
    assert project.status()["checkpoint_step"] > 0


def test_usr2_to_the_whole_process_group_saves_and_kills_nobody(project: Project) -> None:
    project.submit(*LONG)
    project.wait_for_training()
    controller = psutil.Process(int(project.status()["job_id"]))
    for process in [controller, *controller.children()]:  # what a `kill -USR2 -- -PGID` reaches
        process.send_signal(signal.SIGUSR2)
    wait_until(lambda: project.status()["state"] == "stopped", timeout=15)
    assert project.status()["checkpoint_step"] > 0


def test_a_stop_that_comes_before_the_ranks_have_handlers_is_not_lost(project: Project) -> None:
    project.submit(*LONG)
    stopped = project.mvit("stop", str(project.run_dir), "--wait")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert project.status()["state"] == "stopped"


def test_no_process_survives_a_killed_controller(project: Project) -> None:
    project.submit(*LONG, "num_workers=2")
    project.wait_for_training()
    controller = int(project.status()["job_id"])
    ranks_and_workers = [
        pid for rank in (0, 1) for pid in (project.facts(rank)[0]["pid"], *project.facts(rank)[0]["workers"])
    ]
    assert len(ranks_and_workers) == 6
    assert all(psutil.pid_exists(pid) for pid in ranks_and_workers)
    os.kill(controller, signal.SIGKILL)

    wait_until(lambda: not project.processes(), timeout=10)
    assert not any(_lives(pid) for pid in ranks_and_workers)
    state = project.status()
    assert state["state"] == "failed"
    assert "controller" in state["detail"]


def test_no_rank_survives_a_killed_guard_and_the_job_ends(project: Project) -> None:
    project.submit(*LONG, "num_workers=1")
    project.wait_for_training()
    guard = psutil.Process(project.facts(0)[0]["pid"]).parent()
    guard.kill()
    ranks = [project.facts(rank)[0]["pid"] for rank in (0, 1)]

    wait_until(lambda: not any(_lives(pid) for pid in ranks), timeout=10)
    wait_until(lambda: project.status()["state"] == "failed", timeout=10)
    assert "the guard of rank 0 is gone" in project.status()["detail"]
    assert not _lives(project.facts(1)[0]["workers"][0])


def test_cancel_ends_a_job_at_once_and_calls_it_stopped(project: Project) -> None:
    project.submit(*LONG)
    project.wait_for_training()
    result = project.mvit("cancel", str(project.run_dir))

    assert result.returncode == 0, result.stderr
    wait_until(lambda: not project.processes(), timeout=10)
    state = project.status()
    assert (state["state"], state["detail"]) == ("stopped", "cancelled without a save")


def test_a_running_job_cannot_be_resumed_a_second_time(project: Project) -> None:
    project.submit(*LONG)
    project.wait_for_training()
    result = project.mvit("resume", str(project.run_dir))

    assert result.returncode == 1
    assert "is running (attempt 1" in result.stderr
    assert "mvit stop" in result.stderr


def test_submit_returns_while_the_job_runs_and_a_reader_of_its_output_is_not_kept_waiting(project: Project) -> None:
    start = time.monotonic()
    result = project.submit(*LONG)  # subprocess.run reads stdout and stderr to their ends

    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 20
    assert project.status()["state"] in ("pending", "running")


def test_ctrl_c_while_following_leaves_the_job_running(project: Project) -> None:
    follower = project.start("submit", "recipe.yaml", "--cluster", "cluster.yaml", "--follow", *LONG)
    project.wait_for_training()
    os.killpg(follower.pid, signal.SIGINT)  # a terminal sends it to the whole foreground group
    output, _ = follower.communicate(timeout=30)

    assert follower.returncode == 130
    assert f"mvit status {project.run_dir} --follow" in output
    step = project.status()["step"]
    wait_until(lambda: project.status()["step"] > step, timeout=10)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
