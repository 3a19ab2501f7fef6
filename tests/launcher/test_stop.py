"""`mvit stop` and `mvit cancel`: in the queue, while a requeue is in flight, of several runs."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.judgement import judge
from launcher.requeue import main as requeue_at_the_end
from launcher.run_folder import RunFolder
from launcher.stop import request_stop
from launcher.submit import refuse_active
from tests.launcher import written
from tests.launcher.project import Project, wait_until
from tests.launcher.written import FakeSlurm, create, event, in_slurm

slurm = written.slurm
PENDING, RUNNING = "7|PENDING|Priority|N/A|", "7|RUNNING|None|2000-01-01T08:00:00|node1"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run that was submitted as Slurm job 7."""
    run = create(tmp_path / "trial")
    in_slurm(run)
    return run


def _start(run: RunFolder, attempt: int) -> None:
    event(run, "start", attempt, -30, executor="slurm", job_id="7", world_size=2, hosts=["node1"])


def test_a_queued_job_is_taken_out_of_the_queue_and_can_be_resumed(
    run: RunFolder, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs(PENDING)
    assert main(["stop", str(run.path), "--wait"]) == 0
    shown = capsys.readouterr().out
    assert f"Slurm job 7 was waiting: taken out of the queue. Go on with: mvit resume {run.path}" in shown
    assert "trial: stopped (taken out of the queue by `mvit stop` before it had started)" in shown
    assert slurm.calls("scancel") == ["scancel --state=PENDING 7"]
    end = run.events()[-1]
    assert (end["event"], end["kind"], end["requeued"]) == ("end", "user_stop", False)
    refuse_active(run)  # does not raise: it may be resumed


def test_a_requeued_job_is_taken_out_of_the_queue_too(run: RunFolder, slurm: FakeSlurm) -> None:
    _start(run, 1)
    event(run, "end", 1, -5, cause="stopped", kind="signalled", detail="told to stop", requeued=True)
    slurm.jobs(PENDING)
    assert "taken out of the queue" in request_stop(run.path)
    found = judge(run)
    assert (found.state, found.detail) == ("stopped", "taken out of the queue by `mvit stop` while it waited again")


def test_a_stop_while_the_requeue_is_in_flight_waits_for_the_queue(run: RunFolder, slurm: FakeSlurm) -> None:
    _start(run, 1)
    event(run, "end", 1, -5, cause="stopped", kind="signalled", detail="told to stop", requeued=True)
    slurm.jobs("7|COMPLETING|None|2000-01-01T08:00:00|node1", then=(PENDING,))
    assert "taken out of the queue" in request_stop(run.path)
    assert judge(run).state == "stopped"


def test_a_job_that_starts_at_the_moment_of_the_stop_is_told_to_save(run: RunFolder, slurm: FakeSlurm) -> None:
    slurm.jobs(PENDING, then=(RUNNING,))  # it was pending when asked, and runs when scancel looks
    assert request_stop(run.path) == "sent USR2 to Slurm job 7; it saves and ends"
    assert slurm.calls("scancel") == ["scancel --state=PENDING 7", "scancel --signal=USR2 7"]
    assert judge(run).state == "running"
    assert run.stop_file(1).exists()


def test_a_stop_holds_for_the_next_life_of_the_job_until_somebody_submits_again(
    run: RunFolder, slurm: FakeSlurm
) -> None:
    _start(run, 1)
    slurm.jobs(RUNNING)
    request_stop(run.path)
    assert run.stop_file(2).exists()  # Slurm requeued it at that moment
    assert run.stop_file(3).exists()
    run.submitit_dir(4).mkdir()
    assert not run.stop_file(4).exists()
    assert run.stop_file(4).parent == run.attempt_dir(4)


def test_of_several_runs_each_is_ended_although_one_is_at_rest(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    for path in paths:
        in_slurm(create(Path(path)))
    event(RunFolder(tmp_path / "b"), "end", 1, 0, cause="finished", detail="", requeued=False)
    slurm.jobs(PENDING)
    written.tool(slurm.folder / "scancel", f'echo "scancel $*" >> {slurm.folder}/calls')  # it takes its time
    assert main(["cancel", *paths]) == 1
    shown = capsys.readouterr()
    assert f"error: {paths[1]} is not running: it is finished." in shown.err
    assert shown.out.splitlines() == [f"{path}: cancelled slurm job 7" for path in (paths[0], paths[2])]
    assert slurm.calls("scancel") == ["scancel 7", "scancel 7"]
    assert [judge(RunFolder(Path(path))).state for path in paths] == ["stopped", "finished", "stopped"]
    assert RunFolder(Path(paths[0])).events()[-1]["kind"] == "cancelled"


@pytest.mark.parametrize(("command", "state"), [("stop", "running"), ("cancel", "stopped")])
def test_scripts_are_told_of_each_run_what_was_done_and_its_state(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], command: str, state: str
) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "nowhere")]
    for path in paths[:2]:
        in_slurm(create(Path(path)))
    event(RunFolder(tmp_path / "b"), "end", 1, 0, cause="finished", detail="", requeued=False)
    slurm.jobs(RUNNING)
    assert main([command, *paths, "--json"]) == 1
    shown = capsys.readouterr()
    first, second, third = json.loads(shown.out)
    done = "sent USR2 to Slurm job 7; it saves and ends"
    if command == "cancel":
        done = "cancelled slurm job 7; its ranks may still save, until Slurm's KillWait is over"
    assert first == {"run_dir": paths[0], "state": state, "done": done}
    assert (second["state"], third["state"]) == ("finished", None)
    assert "is not running: it is finished" in second["error"]
    assert "is not a run folder" in third["error"]
    assert shown.err.count("error: ") == 2
    assert main([command, paths[2], "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_scripts_that_wait_are_told_whether_the_run_has_ended(
    run: RunFolder, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs(PENDING)
    assert main(["stop", str(run.path), "--wait", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["ended"]) == ("stopped", True)
    assert "taken out of the queue" in told["done"]


def test_cancel_waits_until_the_job_has_left_slurm(run: RunFolder, slurm: FakeSlurm) -> None:
    slurm.jobs(RUNNING, then=("7|COMPLETING|None|N/A|node1", "7|COMPLETING|None|N/A|node1"))
    written.tool(slurm.folder / "scancel", f'echo "scancel $*" >> {slurm.folder}/calls')
    assert main(["cancel", str(run.path), "--wait", "--timeout", "3"]) == 1  # still completing
    written.tool(slurm.folder / "squeue", "exit 0")
    refused = main(["cancel", str(run.path)])
    assert refused == 1


def test_where_slurm_is_not_installed_the_way_out_is_named(
    run: RunFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["stop", str(run.path)]) == 1
    assert "Slurm is not installed here; use a login node" in capsys.readouterr().err


def test_cancel_with_wait_returns_when_no_process_is_left(project: Project) -> None:
    project.submit("steps=100000")
    project.wait_for_training()
    result = project.mvit("cancel", str(project.run_dir), "--wait")
    assert result.returncode == 0, result.stderr
    assert "no process of it is left" in result.stdout
    wait_until(lambda: not project.processes(), timeout=5)
    assert project.status()["state"] == "stopped"


@pytest.mark.parametrize(
    ("shown", "cancelled"),
    [
        ("JobState=RUNNING Reason=None Restarts=0", False),
        ("JobState=COMPLETING Reason=None Restarts=0", True),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", False),
    ],
)
def test_a_job_that_somebody_cancels_in_slurm_does_not_come_back(
    run: RunFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, shown: str, cancelled: bool
) -> None:
    _start(run, 1)
    (slurm.folder / "ended").write_text(f"JobId=7 JobName=trial Requeue=1 {shown}\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    written.rank(run, 1, 0, exit_code=85, signals=[{"name": "SIGTERM", "time": 0.0}])
    cluster = '{"executor": "slurm", "ranks_per_node": 1, "timeout_min": 60}'
    requeue_at_the_end([str(run.path), "1", cluster, "85"])
    end = next(event for event in run.events() if event["event"] == "end")
    assert (end["kind"] == "cancelled") is cancelled
    assert end["requeued"] is not cancelled
    assert (slurm.calls("scontrol requeue") == ["scontrol requeue 7"]) is not cancelled
