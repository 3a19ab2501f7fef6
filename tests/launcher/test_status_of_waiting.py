"""`mvit status` and `why` of what does not train now: broken chains, queued lives, stops asked for, evaluations."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.run_folder import RunFolder, write_json
from launcher.status import run_state
from tests.launcher import written
from tests.launcher.project import ROOT
from tests.launcher.written import FakeSlurm, create, event, figures, in_slurm, printed, start

slurm = written.slurm


def _broken_chain(path: Path) -> RunFolder:
    """Write a chain of three whose first run failed, so that Slurm dropped the others; return the last."""
    first, second, last = (create(path / name) for name in ("a", "b", "c"))
    start(first, 1, -60, executor="slurm", job_id="6")
    event(first, "end", 1, -50, cause="failed", kind="error", detail="rank 0 (pid 1) raised: it broke", requeued=False)
    for run, job, before, after in ((second, "7", first, "6"), (last, "8", second, "7")):
        waited = {"run_dir": str(before.path), "job_id": after}
        event(run, "submit", 1, -70, executor="slurm", job_id=job, world_size=2, after=waited)
    return last


def test_a_job_whose_chain_broke_never_started_and_names_the_runs_to_resume_in_their_order(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs()
    last = _broken_chain(tmp_path)
    a, b, c = (str(tmp_path / name) for name in "abc")
    told = (
        f"it never started: the run it waited for did not finish, {a} is failed: rank 0 (pid 1) raised: it broke. "
        f"Go on with: mvit resume {a}, then mvit resume {b}, then mvit resume {c}"
    )
    state = run_state(last.path)
    assert (state.headline, state.resume_first) == (f"c: failed: {told}", [a, b])
    for command in ("why", "status"):
        assert main([command, str(last.path)]) == 0
        text = capsys.readouterr().out
        assert told in text
        assert "lost" not in text
        assert "record of a failure" not in text
        assert "continue with" not in text
        assert text.count("Go on with") == 1
    assert main(["why", str(last.path), "--json"]) == 0
    found = printed(capsys.readouterr().out)
    assert (found["end"]["kind"], found["resume_first"], found["history"][0]["kind"]) == (
        "never started",
        [a, b],
        "never started",
    )


def test_a_job_in_the_queue_has_no_nodes_and_a_life_that_never_started_does_not_count(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run, at=-100)
    start(run, 1, -90, executor="slurm", hosts=("node1", "node2"))
    slurm.jobs("7|RUNNING|None|N/A|node1")
    assert run_state(run.path).hosts == ["node1", "node2"]
    event(run, "first_step", 1, -80, step=1)
    event(run, "progress", 1, -60, step=9, train_s=20.0, stall_s=0.0, evaluate_s=0.0, data_wait_s=0.0)
    event(run, "end", 1, -50, cause="stopped", kind="signalled", detail="told to stop", requeued=True)
    slurm.jobs("7|PENDING|Resources|N/A|")
    assert run_state(run.path).hosts == []
    in_slurm(run, attempt=2, at=-5)
    assert run_state(run.path).hosts == []
    event(run, "end", 2, -1, cause="stopped", kind="cancelled", detail="cancelled", requeued=False)
    state = run_state(run.path)
    assert state.hosts == []
    assert "lives: 1 (1 signalled)" in state.where_time_went


def test_a_running_run_that_was_asked_to_stop_says_so(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    assert "asked to stop" not in str(run_state(run.path))
    run.stop_file(1).parent.mkdir(parents=True, exist_ok=True)
    run.stop_file(1).touch()
    assert "asked to stop (`mvit stop`)" in str(run_state(run.path))
    event(run, "end", 1, 0, cause="stopped", kind="user_stop", detail="stopped by `mvit stop`", requeued=False)
    assert "asked to stop" not in str(run_state(run.path))


def test_an_evaluation_job_shows_what_it_evaluates_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = create(tmp_path / "trial")
    (subject.path / "checkpoints" / "step_00000090").mkdir(parents=True)
    folder = create(subject.path / "evaluation")
    write_json(folder.run_file, {"name": "trial-evaluation", "id": "x", "evaluates": str(subject.path)})
    start(folder, 1, -60)
    text = str(run_state(folder.path))
    assert f"evaluates step 90 of {subject.path}" in text
    assert "no checkpoint yet" not in text
    figures(folder, "evaluate", 90, -2, top1=0.75)
    event(folder, "end", 1, -1, cause="finished", kind="finished", detail="", requeued=False, step=90)
    text = str(run_state(folder.path))
    assert f"evaluates step 90 of {subject.path}\nfigures: top1 0.75" in text
    assert main(["why", str(folder.path)]) == 0
    text = capsys.readouterr().out
    assert f"evaluates {subject.path}" in text
    assert "1-90" not in text


def _following(run: RunFolder) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launcher.cli", "status", str(run.path), "--follow"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_who_follows_a_run_is_told_what_it_does_before_it_logs(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    following = _following(run)
    assert following.stdout is not None
    assert following.stdout.readline() == "running, attempt 1: imports, process group, model, data\n"
    event(run, "restored", 1, 0, step=0, seconds=1.0)
    assert following.stdout.readline() == "running, attempt 1: its first step\n"
    figures(run, "train", 1, 0, loss=1.0)
    assert following.stdout.readline().startswith("step 1/400")
    event(run, "first_step", 1, 0, step=1)
    event(run, "end", 1, 0, cause="stopped", kind="user_stop", detail="stopped", requeued=False)
    rest, _ = following.communicate(timeout=30)
    assert following.returncode == 85
    assert rest.startswith("trial: stopped (stopped)")


def test_who_follows_a_run_in_the_queue_is_told_why_it_waits(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    slurm.jobs("7|PENDING|Priority|N/A|")
    following = _following(run)
    assert following.stdout is not None
    told = following.stdout.readline()
    following.kill()
    following.wait()
    assert told.startswith("pending, attempt 1: Slurm says PENDING (Priority): other jobs stand before it")
