"""Lives that nobody was left to record, or that `mvit cancel` recorded early: their kind, their time, their steps."""

import os
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.judgement import judge, record_unrecorded_end
from launcher.lives import close_lost_attempts
from launcher.preemption import EXIT_STOPPED
from launcher.requeue import record_cancel
from launcher.run_folder import RunFolder, RunFolderError, rank_file, write_json
from launcher.status import run_state
from launcher.stop import cancel, request_stop
from mvit.ledger import Account, account
from tests.launcher import written
from tests.launcher.written import FakeSlurm, create, event, in_slurm

slurm = written.slurm
HOUR = 3600.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run whose life in Slurm job 7 began two hours ago."""
    run = create(tmp_path / "trial")
    in_slurm(run, at=-2 * HOUR - 60)
    event(run, "start", 1, -2 * HOUR, executor="slurm", job_id="7", world_size=2, gpus=2, hosts=["node1"])
    return run


def _train(run: RunFolder) -> None:
    """Do 90 steps of a second in it, and save the 40th."""
    event(run, "restored", 1, -2 * HOUR + 20, step=0, seconds=1.0)
    event(run, "first_step", 1, -2 * HOUR + 31, step=1)
    for step in (1, 40, 90):
        facts = {"train_s": float(step), "stall_s": 0.0, "evaluate_s": 0.0, "data_wait_s": 0.0}
        event(run, "progress", 1, -2 * HOUR + 30 + step, step=step, **facts)
    event(run, "saved", 1, -2 * HOUR + 71, step=40, seconds=1.0, stall_s=0.0)
    (run.path / "checkpoints" / "step_00000040").mkdir(parents=True)


def _terminated(run: RunFolder, at: float) -> None:
    """Leave the records of two ranks that Slurm told to end and then killed, their guards too."""
    when = time.time() + at
    for number in (0, 1):
        record = {"rank": number, "world_size": 2, "node": "node1", "pid": 100 + number, "process": None}
        told = {"signals": [{"name": "SIGTERM", "time": when}], "last_beat": when - 1}
        place = {"started": when - 100, "last_step": 90, "last_phase": "log"}
        write_json(rank_file(run.attempt_dir(1), number, ".json"), record | told | place)


def _account(run: RunFolder) -> Account:
    return account(run.events(), time.time())


@pytest.mark.parametrize("trains", [True, False], ids=["running", "starting"])
def test_a_job_cancelled_in_slurm_ended_as_cancelled_when_it_was_last_heard_of_before_and_after_the_resume(
    run: RunFolder, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], trains: bool
) -> None:
    if trains:
        _train(run)
    _terminated(run, -2 * HOUR + 130)
    slurm.jobs()
    slurm.ended("CANCELLED")
    before = run_state(run.path)
    assert before.state == "stopped"
    (life,) = before.ledger["lives"]
    assert (life["kind"], life["duration_s"]) == ("cancelled", pytest.approx(130, abs=1))
    assert life["start_s"] == pytest.approx(30 if trains else 130, abs=2)
    assert before.ledger["wall_s"] == pytest.approx(190, abs=1)
    assert main(["why", str(run.path)]) == 0
    text = capsys.readouterr().out
    ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(life_end := before.last_end["ended"]))
    assert f"attempt 1 ended on {ended}: cancelled" in text
    assert life_end == pytest.approx(time.time() - 2 * HOUR + 130, abs=5)
    assert "preempted" not in text
    with pytest.raises(RunFolderError, match="is not running: it is stopped"):
        request_stop(run.path)

    record_unrecorded_end(run)  # as `mvit resume` does
    record_unrecorded_end(run)
    assert [one["event"] for one in run.events()].count("end") == 1
    after = run_state(run.path)
    assert after.ledger == before.ledger
    event(run, "submit", 2, 0, executor="slurm", job_id="8", world_size=2, process=None)
    found = _account(run)
    assert (found.lives[1].paused_s, found.wall_s) == pytest.approx((2 * HOUR - 130, 190), abs=5)
    assert found.ends == {"cancelled": 1}


def test_a_next_life_elsewhere_closes_a_job_cancelled_in_slurm_as_cancelled(run: RunFolder, slurm: FakeSlurm) -> None:
    """As `mvit train RECIPE --resume` is one: no submission closed it."""
    _terminated(run, -2 * HOUR + 130)
    slurm.ended("CANCELLED")
    close_lost_attempts(run, before=2)
    end = run.events()[-1]
    assert (end["kind"], end["requeued"], end["reason"]) == ("cancelled", False, "somebody cancelled the job")
    assert _account(run).run_s == pytest.approx(130, abs=1)


def test_a_job_cancelled_while_it_waited_again_waited_until_slurm_says_it_left(
    run: RunFolder, slurm: FakeSlurm
) -> None:
    _train(run)
    event(run, "end", 1, -2 * HOUR + 200, cause="failed", kind="killed", detail="killed", requeued=True)
    slurm.jobs()
    left = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - HOUR))
    slurm.ended(f"CANCELLED EndTime={left}")
    before = run_state(run.path).ledger
    assert (before["queue_s"], before["wall_s"]) == pytest.approx((60 + HOUR - 200, 60 + HOUR), abs=5)
    assert before["ends"] == {"killed": 1}
    record_unrecorded_end(run)
    assert run_state(run.path).ledger == before
    detail = run_state(run.path).detail
    assert detail == "cancelled in the queue, while it waited again; the newest checkpoint is of step 40"


def test_what_ranks_save_after_mvit_cancel_counts_and_is_told(run: RunFolder, slurm: FakeSlurm) -> None:
    _train(run)
    slurm.jobs("7|RUNNING|None|2000-01-01T08:00:00|node1")
    assert cancel(run.path).startswith("cancelled slurm job 7; its ranks may still save")
    assert judge(run).detail == "cancelled by `mvit cancel`; the newest checkpoint is of step 40"
    assert _account(run).lives[0].lost_steps == 50
    event(run, "saved", 1, 2, step=90, seconds=1.0, stall_s=1.0)
    (run.path / "checkpoints" / "step_00000090").mkdir()
    assert judge(run).detail == "cancelled by `mvit cancel`; the newest checkpoint is of step 90"
    found = account(run.events(), time.time() + 60)
    assert (found.step, found.lives[0].lost_steps, found.lost_hours) == (90, 0, 0.0)
    assert found.ends == {"cancelled": 1}

    record_cancel(run, 1, EXIT_STOPPED)  # its batch script lived to tell
    assert judge(run).detail == "cancelled by `mvit cancel`, everything saved"
    assert account(run.events(), time.time() + 60).lives[0].lost_steps == 0


def test_a_batch_script_that_is_faster_than_mvit_cancel_has_the_last_word(run: RunFolder, slurm: FakeSlurm) -> None:
    slurm.jobs("7|RUNNING|None|2000-01-01T08:00:00|node1")
    end = '{"event": "end", "attempt": 1, "time": 1.0, "cause": "stopped", "kind": "cancelled", "detail": "all saved"}'
    written.tool(slurm.folder / "scancel", f"echo '{end}' >> {run.attempts_file}")
    cancel(run.path)
    assert [one["detail"] for one in run.events() if one["event"] == "end"] == ["all saved"]


def test_a_life_that_slurm_requeued_by_itself_ended_when_it_was_last_heard_of(
    run: RunFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(run)
    _terminated(run, -2 * HOUR + 130)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the next life of the same job
    close_lost_attempts(run, before=2)
    end = run.events()[-1]
    assert (end["kind"], end["requeued"]) == ("preempted", True)
    slurm.jobs("7|RUNNING|None|2099-01-01T08:00:00|node1")
    assert judge(run).state == "running"
    event(run, "start", 2, 0, executor="slurm", job_id="7", world_size=2, gpus=2, checkpoint_step=40)
    found = _account(run)
    assert (found.lives[0].duration_s, found.lives[1].queue_s) == pytest.approx((130, 2 * HOUR - 130), abs=5)
    assert main(["why", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert time.strftime("attempt 1 ended on %Y-%m-%d %H:%M:%S: preempted", time.localtime(end["ended"])) in text
    assert end["ended"] < end["time"] - HOUR
    assert "what followed: requeued: Slurm itself sent the job back to the queue" in text


def test_what_ranks_printed_is_a_sign_of_life(run: RunFolder, slurm: FakeSlurm) -> None:
    log = written.log(run, 1, 0, "importing torch\n")
    os.utime(log, (time.time(), time.time() - HOUR))
    slurm.jobs()
    slurm.ended("CANCELLED")
    assert run_state(run.path).ledger["run_s"] == pytest.approx(HOUR, abs=5)
    os.utime(log, (time.time(), time.time() + HOUR))  # the clock of a file server
    assert run_state(run.path).ledger["run_s"] == pytest.approx(2 * HOUR, abs=5)


def test_the_first_record_s_figures_of_the_ledger_are_not_shown_beside_the_account(run: RunFolder) -> None:
    _train(run)
    written.figures(run, "train", 90, 0, loss=1.5, ettr=0.0, lost_gpu_hours=0.0, checkpoint_overhead=0.0, mttf_h=1.0)
    state = run_state(run.path)
    (shown,) = [line for line in str(state).splitlines() if line.startswith("last metrics")]
    assert shown == "last metrics: loss 1.5"
    assert state.metrics["ettr"] == 0.0
