"""What follows a life of a batch job: requeue or end, by exit code, progress and who asked."""

import time
from pathlib import Path

import pytest

from launcher.policy import Budgets
from launcher.preemption import EXIT_FAILED, EXIT_STOPPED
from launcher.requeue import after_life, is_orphan, requeue
from launcher.run_folder import RunFolder, append_json_line, rank_file, write_json
from launcher.slurm import Node, SlurmFacts
from launcher.status import run_state


def _run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    write_json(run.run_file, {"name": "trial"})
    return run


def _life(run: RunFolder, attempt: int, exit_code: int, checkpoint: int | None = None) -> bool:
    before = run.checkpoint_step()
    run.append_event("start", attempt, executor="slurm", job_id="7", world_size=2, checkpoint_step=before)
    if checkpoint is not None:
        (run.path / "checkpoints" / f"step_{checkpoint:08d}").mkdir(parents=True)
    _, decision = after_life(run, attempt, exit_code, Budgets(exclude_after=0))
    return decision.requeue


def _kill(run: RunFolder, attempt: int) -> None:
    record = {"rank": 1, "node": "n1", "pid": 5, "ended": 9.0, "exit_code": None, "signal": "SIGKILL", "signals": []}
    write_json(rank_file(run.attempt_dir(attempt), 1, ".json"), record)


def test_three_failures_in_a_row_without_a_newer_checkpoint_end_the_job(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert [_life(run, attempt, 137) for attempt in (1, 2, 3)] == [True, True, True], "nobody knows why: node faults"
    for attempt in (4, 5, 6):
        _kill(run, attempt)
    assert [_life(run, attempt, 137) for attempt in (4, 5, 6)] == [True, True, False]
    state = run_state(tmp_path)
    assert state.state == "failed"
    assert "killed by SIGKILL" in state.detail
    assert "3 of 3 in a row without a newer checkpoint" in run.events()[-1]["reason"]


def test_progress_starts_the_count_anew_and_preemptions_do_not_count(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for attempt in range(1, 9):
        _kill(run, attempt)
    assert _life(run, 1, 137)
    assert _life(run, 2, 137)
    assert _life(run, 3, 137, checkpoint=10)  # failed, but later than before
    assert _life(run, 4, 137)
    assert _life(run, 5, EXIT_STOPPED)
    assert _life(run, 6, 137)
    assert not _life(run, 7, 137)


def test_a_life_that_never_started_is_closed_with_a_reason(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.append_event("submit", 1, executor="slurm", job_id="7")
    ending, decision = after_life(run, 1, 1, Budgets())
    assert (ending.kind, decision.requeue) == ("lost", True)
    assert "node fault 1 of 10" in decision.reason


def test_the_record_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for rank, at, message in ((0, 20.0, "connection reset"), (3, 10.0, "out of memory")):
        error = {"rank": rank, "pid": 5, "time": at, "type": "RuntimeError", "message": message, "traceback": "…"}
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


@pytest.mark.parametrize(("free", "expected"), [(3, "n1,n2"), (2, "n2")])
def test_nodes_blamed_twice_are_left_out_as_far_as_enough_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    """Of four nodes two are blamed and one or two are needed: the blame that ends first is forgiven."""
    run, now = _run(tmp_path), time.time()
    for attempt, (host, age) in enumerate((("n1", 50.0), ("n1", 40.0), ("n2", 30.0), ("n2", 20.0)), start=1):
        line = {"event": "end", "attempt": attempt, "time": now - age, "cause": "failed", "kind": "hung"}
        append_json_line(run.attempts_file, line | {"blamed": [host]})
    calls = tmp_path / "calls"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "low")
    names = ["n1", "n2", "n3", "n4"][: free + 1]
    nodes = tuple(Node(name, ("low",), ("IDLE",), 8, 1000, 0, (), "") for name in names)
    monkeypatch.setattr("launcher.requeue.read_slurm", lambda: SlurmFacts({}, (), nodes, None))
    assert requeue(run, 4, "7", Budgets(), "bad9") is None
    assert calls.read_text().splitlines() == ["requeue 7", f"update JobId=7 ExcNodeList=bad9,{expected}"]
    event = run.events()[-1]
    assert (event["event"], ",".join(event["hosts"])) == ("exclude", expected)
    assert event["why"]["n2"] == "life 3: hung; life 4: hung"


def test_a_requeue_that_slurm_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Access/permission denied' >&2; exit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert requeue(_run(tmp_path), 1, "7", Budgets(), "") == "scontrol requeue 7: Access/permission denied"
