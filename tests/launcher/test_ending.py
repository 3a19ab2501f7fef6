"""From what the ranks left behind: how a life ended, which rank was first, and which node is to blame."""

from pathlib import Path
from typing import Any

import pytest

from launcher import ending
from launcher.claims import check_claim, claim_life, owner_of
from launcher.ending import classify
from launcher.lives import close_lost_attempts
from launcher.preemption import EXIT_FAILED, EXIT_FENCED, EXIT_HUNG, EXIT_STOPPED
from launcher.run_folder import RunFolder, rank_file, write_json
from launcher.slurm import Node, SlurmFacts
from mvit.life import Superseded

NODES = ("n1", "n2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    _cluster(monkeypatch)
    run = RunFolder(tmp_path)
    run.append_event("start", 1, executor="slurm", job_id="7", world_size=4, hosts=list(NODES), checkpoint_step=0)
    return run


def _cluster(monkeypatch: pytest.MonkeyPatch, **states: str) -> None:
    """Let Slurm say that each node is in the state given, the others idle."""
    nodes = tuple(
        Node(name, ("low",), (states.get(name, "IDLE"),), 8, 1000, 0, (), "") for name in (*NODES, "n3", "n9")
    )
    monkeypatch.setattr(ending, "read_slurm", lambda: SlurmFacts({}, (), nodes, None))


def _rank(run: RunFolder, rank: int, **facts: Any) -> None:
    record = {
        "rank": rank,
        "world_size": 4,
        "node": NODES[rank // 2],
        "pid": 100 + rank,
        "process": None,
        "signals": [],
        "last_step": 12,
        "last_phase": "compute",
        "last_beat": 50.0,
    }
    write_json(rank_file(run.attempt_dir(1), rank, ".json"), record | facts)


def _ended(code: int | None, at: float, signal: str | None = None, because: str | None = None) -> dict[str, Any]:
    return {"ended": at, "exit_code": code, "signal": signal, "ended_because": because}


def _error(run: RunFolder, rank: int, at: float, message: str, traceback: str = "") -> None:
    error = {"rank": rank, "pid": 100 + rank, "node": NODES[rank // 2], "time": at, "type": "RuntimeError"}
    write_json(rank_file(run.attempt_dir(1), rank, ".error.json"), error | {"message": message, "traceback": traceback})


def _terminated(at: float) -> dict[str, Any]:
    return {"signals": [{"name": "SIGTERM", "time": at}]}


def test_all_ranks_saved_on_request(run: RunFolder) -> None:
    for rank in range(4):
        _rank(run, rank, signals=[{"name": "SIGUSR2", "time": 1.0}], **_ended(EXIT_STOPPED, 9.0))
    assert (classify(run, 1, EXIT_STOPPED).kind, classify(run, 1, None).kind) == ("signalled", "signalled")
    assert "SIGUSR2" in classify(run, 1, EXIT_STOPPED).detail
    run.stop_file(1).touch()
    assert classify(run, 1, EXIT_STOPPED).kind == "user_stop"


def test_a_stop_is_whole_though_a_rank_was_killed_while_it_left(run: RunFolder) -> None:
    """Ranks leave with 85 after a collective save; what ends a slow one afterwards harms nothing."""
    _rank(run, 0, **_ended(None, 9.5, "SIGKILL"))
    for rank in (1, 2, 3):
        _rank(run, rank, **_ended(EXIT_STOPPED, 9.0))
    assert classify(run, 1, 137).kind == "signalled"


def test_a_rank_that_failed_before_others_were_told_to_stop_is_the_cause(run: RunFolder) -> None:
    _rank(run, 1, **_ended(None, 9.0, "SIGKILL"))
    for rank in (0, 2, 3):
        _rank(run, rank, **_terminated(12.0), **_ended(EXIT_STOPPED, 12.5))
    assert (classify(run, 1, 137).kind, classify(run, 1, 137).rank) == ("killed", 1)
    _rank(run, 1, **_ended(EXIT_FAILED, 9.0))
    _error(run, 1, 8.9, "bad sample")
    assert classify(run, 1, EXIT_FAILED).kind == "error"


def test_what_a_saved_stop_brings_about_on_a_node_whose_clock_is_behind_is_no_cause(run: RunFolder) -> None:
    _rank(run, 0, **_ended(EXIT_STOPPED, 9.0))
    _rank(run, 3, **_ended(None, 8.7, "SIGABRT"))
    assert (classify(run, 1, 134).kind, classify(run, 1, 134).blamed) == ("signalled", ())


def test_ranks_whose_command_is_not_there_are_no_fault_of_a_node(run: RunFolder) -> None:
    assert classify(run, 1, 127).kind == "error"
    assert classify(run, 1, 1).kind == "lost"


@pytest.mark.parametrize(("phase", "finished"), [("data", 11), ("compute", 11), ("log", 12), ("evaluate", 12)])
def test_a_step_that_was_begun_is_not_finished(run: RunFolder, phase: str, finished: int) -> None:
    for rank in range(4):
        _rank(run, rank, last_phase=phase, **_ended(None, 9.0, "SIGKILL"))
    assert classify(run, 1, 137).step == finished


def test_a_life_that_did_not_come_to_training_finished_no_step(run: RunFolder) -> None:
    _rank(run, 0, last_step=0, last_phase="start", **_ended(None, 9.0, "SIGKILL"))
    assert classify(run, 1, 137).step is None


def test_a_life_that_was_cancelled_in_the_queue_is_no_failure(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_event("submit", 1, executor="slurm", job_id="7")
    run.append_event("submit", 2, executor="slurm", job_id="8")
    close_lost_attempts(run, before=2)
    end = run.events()[-1]
    assert (end["attempt"], end["kind"], end["reason"]) == (1, "cancelled", "submitted again")


def test_a_killed_rank_comes_before_the_exceptions_that_follow_from_it(run: RunFolder) -> None:
    _error(run, 0, 10.0, "Connection closed by peer")
    _rank(run, 0, **_ended(EXIT_FAILED, 10.5))
    _rank(run, 3, **_ended(None, 10.2, "SIGKILL"))
    _rank(run, 1, **_ended(None, 12.0, "SIGKILL", because="rank 3 failed"))
    found = classify(run, 1, 137)
    assert (found.kind, found.rank, found.host, found.blamed) == ("killed", 3, "n2", ("n2",))
    assert found.step == 11


def test_an_abort_after_an_exception_elsewhere_is_not_the_first(run: RunFolder) -> None:
    _error(run, 2, 10.0, "bad sample")
    _rank(run, 2, **_ended(EXIT_FAILED, 10.1))
    _rank(run, 0, **_ended(None, 10.6, "SIGABRT"))
    found = classify(run, 1, 134)
    assert (found.kind, found.rank, found.blamed) == ("error", 2, ())


def test_errors_of_two_lives_have_the_same_name_whatever_numbers_they_hold(run: RunFolder) -> None:
    place = 'File "/a/b.py", line 7, in step\n'
    names = set()
    for number in (4711, 4712):
        _error(run, 1, 10.0, f"tensor at 0x{number:x} of process {number}", place)
        _rank(run, 1, **_ended(EXIT_FAILED, 10.1))
        names.add(classify(run, 1, EXIT_FAILED).error)
    assert names == {"RuntimeError at b.py:7:step: tensor at # of process #"}


def test_an_error_of_the_hardware_is_a_node_fault(run: RunFolder) -> None:
    _error(run, 3, 10.0, "CUDA error: uncorrectable ECC error encountered")
    _rank(run, 3, **_ended(EXIT_FAILED, 10.1))
    found = classify(run, 1, EXIT_FAILED)
    assert (found.kind, found.blamed) == ("node", ("n2",))


def test_a_hang_is_blamed_on_the_rank_that_the_others_wait_for(run: RunFolder) -> None:
    waiting = (
        'Thread 0x1:\n  File "x.py", line 1 in pool\nThread 0x2:\n  File "torch/distributed/c10d.py", line 3 in wait\n'
    )
    for rank in range(4):
        _rank(run, rank, hung=True, state="sleeping", last_beat=50.0 + rank, **_ended(None, 80.0, "SIGKILL", "hangs"))
        rank_file(run.attempt_dir(1), rank, ".stacks.txt").write_text(waiting)
    rank_file(run.attempt_dir(1), 3, ".stacks.txt").write_text('Thread 0x2:\n  File "data.py", line 9 in read\n')
    mark = {"rank": 0, "node": "n1", "step": 12, "phase": "compute", "age_s": 20.3, "limit_s": 20, "time": 79.0}
    write_json(run.attempt_dir(1) / "hang.json", mark)
    found = classify(run, 1, EXIT_HUNG)
    assert (found.kind, found.rank, found.host, found.blamed) == ("hung", 3, "n2", ("n2",))
    assert "3 of 4 ranks waited for others" in found.detail


def _hung(run: RunFolder, rank: int, stack: str, **facts: Any) -> None:
    _rank(run, rank, **({"hung": True} | facts), **_ended(None, 80.0, "SIGKILL", "hangs"))
    rank_file(run.attempt_dir(1), rank, ".stacks.txt").write_text(stack)
    write_json(run.attempt_dir(1) / "hang.json", {"rank": 0, "node": "n1", "age_s": 20.3, "time": 79.0})


SYNCHRONIZING = 'Thread 0x1:\n  File "torch/cuda.py", line 9 in synchronize\n  File "trainer.py", line 7 in step\n'


def test_where_devices_wait_the_rank_that_is_behind_is_blamed(run: RunFolder) -> None:
    for rank in range(4):
        _hung(run, rank, SYNCHRONIZING, last_step=12 - (rank == 2))
    assert (classify(run, 1, EXIT_HUNG).rank, classify(run, 1, EXIT_HUNG).blamed) == (2, ("n2",))


def test_where_devices_wait_the_rank_that_stands_elsewhere_is_blamed(run: RunFolder) -> None:
    for rank in range(4):
        _hung(run, rank, SYNCHRONIZING)
    _hung(run, 1, 'Thread 0x1:\n  File "tar.py", line 3 in read\n', last_beat=60.0)
    assert (classify(run, 1, EXIT_HUNG).rank, classify(run, 1, EXIT_HUNG).blamed) == (1, ("n1",))


def test_a_rank_that_is_alone_stands_apart_from_nobody(run: RunFolder) -> None:
    _hung(run, 0, SYNCHRONIZING)
    assert (classify(run, 1, EXIT_HUNG).kind, classify(run, 1, EXIT_HUNG).blamed) == ("hung", ())


def test_where_all_stand_at_the_same_place_no_node_is_blamed(run: RunFolder) -> None:
    """A kernel that waits looks like one that hangs: a guess would exclude good nodes."""
    for rank in range(4):
        _hung(run, rank, SYNCHRONIZING, last_beat=50.0 + rank)
    assert (classify(run, 1, EXIT_HUNG).kind, classify(run, 1, EXIT_HUNG).blamed) == ("hung", ())


def test_a_node_that_was_not_told_of_the_end_was_lost(run: RunFolder) -> None:
    """Slurm ends the ranks of the nodes it reaches; the others fail later, because their peers are gone."""
    for rank in (0, 1):
        _rank(run, rank, **_terminated(20.0))
    _error(run, 2, 20.4, "Connection closed by peer")
    _rank(run, 2, **_ended(EXIT_FAILED, 20.5))
    _rank(run, 3)
    found = classify(run, 1, None)
    assert (found.kind, found.blamed) == ("node", ("n2",))
    assert "n2 was lost" in found.detail


def test_a_node_that_slurm_says_is_down_was_lost_though_a_watchdog_saw_the_silence_first(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cluster(monkeypatch, n2="DOWN", n9="DOWN")
    for rank in range(4):
        _rank(run, rank, hung=True, **_ended(None, 80.0, "SIGKILL", "hangs"))
    write_json(run.attempt_dir(1) / "hang.json", {"rank": 0, "node": "n1", "age_s": 20.3, "time": 79.0})
    found = classify(run, 1, None)
    assert (found.kind, found.blamed) == ("node", ("n2",))


def test_a_node_that_could_not_write_what_it_was_told_is_not_lost_while_the_batch_script_lives(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        _rank(run, rank, **_terminated(20.0))
    for rank in (2, 3):
        _rank(run, rank)
    assert (classify(run, 1, 137).kind, classify(run, 1, 137).blamed) == ("preempted", ())
    _cluster(monkeypatch, n2="DOWN")
    assert (classify(run, 1, 137).kind, classify(run, 1, 137).blamed) == ("node", ("n2",))


def test_a_failure_before_slurm_ended_the_life_is_the_cause(run: RunFolder) -> None:
    _error(run, 2, 10.0, "bad sample")
    _rank(run, 2, **_ended(EXIT_FAILED, 10.2))
    for rank in (0, 1, 3):
        _rank(run, rank, **_terminated(20.0))
    assert classify(run, 1, None).kind == "error"


def test_all_nodes_told_and_no_save_is_a_preemption(run: RunFolder) -> None:
    for rank in range(4):
        _rank(run, rank, **_terminated(20.0 + rank / 10))
    found = classify(run, 1, None)
    assert (found.kind, found.blamed, found.step) == ("preempted", (), 11)


@pytest.mark.parametrize(
    ("state", "kind", "blamed"),
    [("DOWN", "node", {"n1"}), ("NOT_RESPONDING", "node", {"n1"}), ("DRAIN", "lost", set()), ("IDLE", "lost", set())],
)
def test_where_no_node_was_told_slurm_is_asked(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, state: str, kind: str, blamed: set[str]
) -> None:
    _cluster(monkeypatch, n1=state)
    for rank in range(4):
        _rank(run, rank)
    found = classify(run, 1, None)
    assert (found.kind, set(found.blamed)) == (kind, blamed)


def test_a_node_that_told_its_ranks_to_end_is_not_lost_though_it_is_down_later(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cluster(monkeypatch, n1="DOWN")
    for rank in range(4):
        _rank(run, rank, **_terminated(20.0))
    assert classify(run, 1, None).kind == "preempted"


def test_a_superseded_life_is_no_failure(run: RunFolder) -> None:
    assert classify(run, 1, EXIT_FENCED).kind == "fenced"


def test_the_highest_life_owns_the_run_whatever_the_order_of_claims(tmp_path: Path) -> None:
    assert owner_of(tmp_path) == 0
    claim_life(tmp_path, 2)
    check_claim(tmp_path, 2)
    claim_life(tmp_path, 3)
    with pytest.raises(Superseded, match="life 3"):
        check_claim(tmp_path, 2)
    with pytest.raises(Superseded, match=r"life 3 .* has taken over from life 1"):
        claim_life(tmp_path, 1)  # an orphan that starts late
    assert owner_of(tmp_path) == 3
    check_claim(tmp_path, 3)
