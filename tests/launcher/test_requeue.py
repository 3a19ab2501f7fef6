"""What follows a life of a batch job: requeue or end, by exit code, progress and who asked."""

import errno
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import requeue as script
from launcher import run_folder
from launcher.cluster import ClusterConfig
from launcher.policy import Budgets
from launcher.preemption import EXIT_FAILED, EXIT_STOPPED
from launcher.requeue import after_life, is_orphan, job_facts, main, requeue
from launcher.run_folder import RunFolder, append_json_line, rank_file, write_json
from launcher.slurm import Node, Partition, SlurmFacts
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


def _scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Path:
    """Put a scontrol on the PATH; returns the file in which it notes each call before it runs `body`."""
    calls, scontrol = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    return calls


def _orders(calls: Path) -> list[str]:
    """Return what scontrol was told to do, without the questions."""
    return [line for line in calls.read_text().splitlines() if "show" not in line]


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def _cluster(**settings: object) -> ClusterConfig:
    given = {"executor": "slurm", "nodes": 2, "ranks_per_node": 2, "timeout_min": 60}
    return ClusterConfig.model_validate(given | settings)


def _blame(run: RunFolder, *hosts: str) -> None:
    """Blame the hosts one after the other, in a life each, the last one 20 s ago."""
    for attempt, host in enumerate(hosts, start=1):
        at = time.time() - 20 - 10 * (len(hosts) - attempt)
        line = {"event": "end", "attempt": attempt, "time": at, "cause": "failed", "kind": "hung", "blamed": [host]}
        append_json_line(run.attempts_file, line)


def _nodes(monkeypatch: pytest.MonkeyPatch, *names: str, **odd: Node) -> None:
    """Let the cluster have one partition of these nodes, all alike but those given."""
    like = Node("", ("low",), ("IDLE",), 8, 64000, 0, ("fast",), "")
    nodes = tuple(replace(odd.get(name, like), name=name) for name in names)
    low = Partition("low", True, "UP", None, None, None, None, 0, "OFF", "")
    monkeypatch.setattr(script, "read_slurm", lambda accounting: SlurmFacts({}, (low,), nodes, None))
    monkeypatch.setattr(script, "expand_hostlist", lambda text: tuple(text.split(",")))
    monkeypatch.setenv("SLURM_JOB_PARTITION", "low")


@pytest.mark.parametrize(("restarts", "orphan"), [("2", False), ("3", True)])
def test_a_script_that_slurm_gave_up_must_not_requeue_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, orphan: bool
) -> None:
    _scontrol(monkeypatch, tmp_path, f"echo 'JobId=7 JobName=trial Requeue=1 Restarts={restarts} BatchFlag=1'")
    assert is_orphan(job_facts("7"), restart_count=2) is orphan


@pytest.mark.parametrize(("names", "expected"), [(("n1", "n2", "n3", "n4"), "n1,n2"), (("n1", "n2", "n3"), "n2")])
def test_nodes_blamed_twice_are_left_out_as_far_as_enough_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], expected: str
) -> None:
    """Two are blamed and two are needed: where only three exist, the blame that ends first is forgiven."""
    run = _run(tmp_path)
    _blame(run, "n1", "n1", "n2", "n2")
    calls = _scontrol(monkeypatch, tmp_path, "")
    _nodes(monkeypatch, *names)
    assert requeue(run, 4, "7", _cluster(exclude="bad9")) is None
    assert _orders(calls) == ["requeue 7", f"update JobId=7 ExcNodeList=bad9,{expected}"]
    event = run.events()[-1]
    assert (event["event"], ",".join(event["hosts"])) == ("exclude", expected)
    assert event["why"]["n2"] == "life 3: hung; life 4: hung"


@pytest.mark.parametrize(
    ("settings", "odd"),
    [
        ({"exclude": "n4"}, {}),
        ({"mem": "32G"}, {"n4": Node("", ("low",), ("IDLE",), 8, 1000, 0, ("fast",), "")}),
        ({"constraint": "fast"}, {"n4": Node("", ("low",), ("IDLE",), 8, 64000, 0, (), "")}),
        ({"cpus_per_rank": 4}, {"n4": Node("", ("low",), ("IDLE",), 4, 64000, 0, ("fast",), "")}),
    ],
    ids=["excluded", "memory", "feature", "cores"],
)
def test_a_node_that_the_job_cannot_use_is_none_that_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], odd: dict[str, Node]
) -> None:
    """Of four nodes one does not fit and two are blamed: leaving out both would keep the job waiting for ever."""
    run = _run(tmp_path)
    _blame(run, "n1", "n1", "n2", "n2")
    _scontrol(monkeypatch, tmp_path, "")
    _nodes(monkeypatch, "n1", "n2", "n3", "n4", **odd)
    assert requeue(run, 4, "7", _cluster(**settings)) is None
    assert run.events()[-1]["hosts"] == ["n2"]


def test_a_node_whose_exclusion_is_over_comes_off_the_jobs_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)
    run.append_event("exclude", 2, hosts=["n1"], until=1.0, why={}, error=None)
    calls = _scontrol(monkeypatch, tmp_path, "")
    _nodes(monkeypatch, "n1", "n2")
    assert requeue(run, 3, "7", _cluster()) is None
    assert _orders(calls) == ["requeue 7", "update JobId=7 ExcNodeList="]
    assert requeue(run, 4, "7", _cluster()) is None
    assert _orders(calls)[2:] == ["requeue 7"], "nothing is left to take off"


def test_a_requeue_that_slurm_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _scontrol(monkeypatch, tmp_path, "echo 'Access/permission denied' >&2; exit 1")
    assert requeue(_run(tmp_path), 1, "7", _cluster()) == "scontrol requeue 7: Access/permission denied"
    assert _orders(calls) == ["requeue 7"], "what is refused is not asked for again"


def test_a_controller_that_restarts_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = f"[ $(wc -l < {tmp_path}/calls) -ge 5 ] || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}"
    calls = _scontrol(monkeypatch, tmp_path, away)
    monkeypatch.setattr(script, "_FIRST_PAUSE_S", 0.01)
    assert requeue(_run(tmp_path), 1, "7", _cluster()) is None
    assert _orders(calls) == ["requeue 7"] * 3


def test_a_requeue_whose_answer_was_lost_is_not_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = f"""case "$1" in
requeue) touch {tmp_path}/done; echo 'Socket timed out on send/recv operation' >&2; exit 1;;
-o) [ -e {tmp_path}/done ] && echo Restarts=1 || echo Restarts=0;;
esac"""
    calls = _scontrol(monkeypatch, tmp_path, answer)
    monkeypatch.setattr(script, "_FIRST_PAUSE_S", 0.01)
    assert requeue(_run(tmp_path), 1, "7", _cluster()) is None
    assert _orders(calls) == ["requeue 7"]


def test_a_run_is_requeued_though_nothing_can_be_written_not_even_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the run folder and the job's output on the same full disk."""
    run = _run(tmp_path)
    run.append_event("start", 1, executor="slurm", job_id="7", world_size=2, checkpoint_step=0)
    calls = _scontrol(monkeypatch, tmp_path, "echo JobState=COMPLETING Reason=NonZeroExitCode Restarts=0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(run_folder.os, "write", _no_space)
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  (closing it fails, too)
    monkeypatch.setattr("sys.stderr", full)
    monkeypatch.setattr("sys.stdout", full)
    try:
        code = main([str(run.path), "1", _cluster().model_dump_json(exclude_defaults=True), "137"])
    finally:
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert code == 0
    assert _orders(calls) == ["requeue 7"]


def test_a_controller_that_stays_away_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    _scontrol(monkeypatch, tmp_path, "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setattr(script, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main([str(run.path), "1", _cluster().model_dump_json(exclude_defaults=True), "137"]) == 0
    end = run.events()[-1]
    assert (end["event"], end["requeued"]) == ("end", False)
    assert "did not answer (scontrol show job 7: Unable to contact slurm controller)" in end["reason"]
    assert f"mvit resume {run.path}" in end["reason"]
