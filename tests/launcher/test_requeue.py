"""What follows a life of a batch job: requeue or end, by exit code, progress and who asked."""

from pathlib import Path

import pytest

from launcher.preemption import EXIT_FAILED, EXIT_STOPPED
from launcher.requeue import after_life, count_failures_without_progress, decide, is_orphan
from launcher.run_folder import RunFolder, append_json_line, rank_file, write_json
from launcher.status import run_state


def _run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    write_json(run.run_file, {"name": "trial"})
    return run


def _life(run: RunFolder, attempt: int, exit_code: int, checkpoint: int | None = None, max_failures: int = 3) -> bool:
    run.append_event(
        "start", attempt, executor="slurm", job_id="7", world_size=2, checkpoint_step=run.checkpoint_step()
    )
    if checkpoint is not None:
        (run.path / "checkpoints" / f"step_{checkpoint:08d}").mkdir(parents=True)
    decision = after_life(run, attempt, exit_code, may_requeue=True, max_failures_without_progress=max_failures)
    return decision.requeue


@pytest.mark.parametrize(
    ("exit_code", "user_stop", "may_requeue", "expected"),
    [
        (0, False, True, ("finished", False)),
        (EXIT_STOPPED, False, True, ("stopped", True)),
        (EXIT_STOPPED, True, True, ("stopped", False)),
        (EXIT_STOPPED, False, False, ("stopped", False)),
        (EXIT_FAILED, False, True, ("failed", True)),
        (137, False, True, ("failed", True)),
        (137, False, False, ("failed", False)),
    ],
)
def test_the_exit_code_decides(exit_code: int, user_stop: bool, may_requeue: bool, expected: tuple[str, bool]) -> None:
    decision = decide(
        exit_code,
        user_stop=user_stop,
        may_requeue=may_requeue,
        failures_without_progress=1,
        max_failures_without_progress=3,
    )
    assert (decision.cause, decision.requeue) == expected


def test_three_failures_in_a_row_without_a_newer_checkpoint_end_the_job(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert [_life(run, attempt, EXIT_FAILED) for attempt in (1, 2, 3)] == [True, True, False]
    state = run_state(tmp_path)
    assert state.state == "failed"
    assert "3 failed lives in a row without a newer checkpoint" in state.detail


def test_progress_and_preemptions_start_the_count_anew(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert _life(run, 1, EXIT_FAILED)
    assert _life(run, 2, EXIT_FAILED)
    assert _life(run, 3, EXIT_FAILED, checkpoint=10)  # failed, but later than before
    assert _life(run, 4, EXIT_FAILED)
    assert _life(run, 5, EXIT_STOPPED)
    assert _life(run, 6, EXIT_FAILED)
    assert _life(run, 7, EXIT_FAILED)
    assert not _life(run, 8, EXIT_FAILED)


def test_a_life_that_never_started_counts_as_a_failure(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.append_event("submit", 1, executor="slurm", job_id="7")
    assert count_failures_without_progress(run.events(), step_now=0) == 1


def test_the_record_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for rank, time, message in ((0, 20.0, "connection reset"), (3, 10.0, "out of memory")):
        error = {"rank": rank, "pid": 5, "time": time, "type": "RuntimeError", "message": message, "traceback": "…"}
        write_json(rank_file(run.attempt_dir(1), rank, ".error.json"), error)
    _life(run, 1, EXIT_FAILED)
    assert run.events()[-1]["detail"].startswith("rank 3 (pid 5) raised RuntimeError: out of memory")


def test_a_requeued_run_is_pending_until_its_next_life_starts(tmp_path: Path) -> None:
    run = _run(tmp_path)
    _life(run, 1, EXIT_STOPPED)
    assert run_state(tmp_path).state == "pending"


def test_a_run_cancelled_while_it_waits_after_a_requeue_is_stopped(tmp_path: Path) -> None:
    run = _run(tmp_path)
    _life(run, 1, EXIT_STOPPED)
    run.append_event("end", 1, cause="stopped", detail="cancelled without a save", requeued=False)
    state = run_state(tmp_path)
    assert (state.state, state.detail) == ("stopped", "cancelled without a save")


def test_the_newest_checkpoint_is_the_one_published_last(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert run.checkpoint_step() == 0
    for step in (50, 42):  # 50 was damaged: the run fell back to 40 and came to 42
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        assert run.checkpoint_step() == 50
    for step in (50, 42, 44):  # 44 has vanished
        append_json_line(tmp_path / "checkpoints" / "published.jsonl", {"step": step})
    assert run.checkpoint_step() == 42


@pytest.mark.parametrize(("restarts", "orphan"), [("2", False), ("3", True)])
def test_a_script_that_slurm_gave_up_must_not_requeue_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, orphan: bool
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 JobName=trial Requeue=1 Restarts={restarts} BatchFlag=1'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert is_orphan("7", restart_count=2) is orphan
