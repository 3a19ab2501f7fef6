"""`mvit why`: what ended a life, on which rank and node, what followed and why, and what a queued job waits for."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.run_folder import RunFolder, write_json
from launcher.why import explain
from tests.launcher import written
from tests.launcher.project import Project, wait_until
from tests.launcher.written import FakeSlurm, create, event, in_slurm, printed, rank, start

slurm = written.slurm


def _why(run: RunFolder, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["why", str(run.path), *options]) == 0
    return capsys.readouterr().out


def _hung(path: Path) -> RunFolder:
    """Write a run whose first life was preempted and whose second hung in rank 2, on a node blamed twice."""
    run = create(path)
    in_slurm(run, at=-1000)
    start(run, 1, -900, hosts=("node1", "node2"), executor="slurm")
    event(run, "restored", 1, -895, step=0, seconds=1.0)
    event(run, "first_step", 1, -890, step=1)
    event(run, "progress", 1, -700, step=30, train_s=190.0)
    facts = {"cause": "failed", "kind": "preempted", "detail": "ended by Slurm", "reason": "preemptions are free"}
    event(run, "end", 1, -690, **facts, requeued=True, checkpoint_step=30, step=30)
    start(run, 2, -600, hosts=("node1", "node2"), executor="slurm", checkpoint_step=30)
    for number in range(4):
        silent = number == 2
        rank(
            run,
            2,
            number,
            node=f"node{number // 2 + 1}",
            signal="SIGKILL",
            ended_because="rank 2 hangs",
            last_step=41 if silent else 42,
            last_phase="data" if silent else "compute",
            signals=[{"name": "SIGTERM", "time": time.time()}] if number < 2 else [],
        )
        stacks = run.attempt_dir(2) / f"rank_{number:04d}.stacks.txt"
        stacks.write_text(f"Thread 0x1 (most recent call first):\n  stack of rank {number}\n")
    hang = {"rank": 0, "node": "node1", "step": 42, "phase": "compute", "age_s": 105.0, "limit_s": 105.0}
    write_json(run.attempt_dir(2) / "hang.json", hang | {"time": time.time()})
    detail = "rank 2 on node2 stood still in step 41 (data) for 105 s, 3 of 4 ranks waited for others"
    facts = {"cause": "failed", "kind": "hung", "detail": detail, "rank": 2, "host": "node2", "blamed": ["node2"]}
    reason = "crash 1 of 3 in a row without a newer checkpoint (max_failures_without_progress); trying again"
    event(run, "end", 2, -100, **facts, reason=reason, requeued=True, checkpoint_step=30, step=41)
    why = {"node2": "life 1: node; life 2: hung"}
    event(run, "exclude", 2, -99, hosts=["node2"], until=time.time() + 86400, why=why)
    return run


def test_a_hang_is_told_by_rank_phase_stacks_decision_and_history(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _hung(tmp_path / "trial")
    slurm.jobs("7|PENDING|BeginTime|2030-01-01T08:00:00|")
    text = _why(run, capsys)
    for expected in (
        "trial: pending",
        "Slurm says PENDING (BeginTime): its begin time has not come: after a requeue Slurm waits",
        "expected to start at 2030-01-01 08:00:00",
        ": hung\n  rank 2 on node2 stood still in step 41 (data) for 105 s",
        "1 rank(s) in step 41 (data): 2",
        "3 rank(s) in step 42 (compute): 0-1, 3",
        "SIGTERM reached rank(s) 0-1",
        "rank_0002.stacks.txt",
        "  stack of rank 2",
        f"stacks of all 4 ranks: mvit logs {run.path} --stacks --all",
        "what followed: requeued: crash 1 of 3 in a row without a newer checkpoint",
        "blamed: node2",
        "node2 (life 1: node; life 2: hung)",
        "1-30   preempted  preemptions are free",
    ):
        assert expected in text
    assert "stack of rank 1" not in text
    header, first, second = text.splitlines()[-3:]
    assert header.split() == ["attempt", "start", "nodes", "steps", "end", "reason"]
    assert (first.split()[0], second.split()[0]) == ("1", "2")
    assert "node1,node2" in second


def test_the_end_of_an_earlier_attempt_can_be_asked_for(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _hung(tmp_path / "trial")
    slurm.jobs("7|PENDING|BeginTime|N/A|")
    text = _why(run, capsys, "--attempt", "1")
    assert "attempt 1 ended on" in text
    assert "what followed: requeued: preemptions are free" in text
    found = printed(_why(run, capsys, "--attempt", "2", "--json"))
    assert (found["attempt"], found["end"]["kind"], found["end"]["rank"]) == (2, "hung", 2)
    assert found["ranks"][0] == {"phase": "data", "step": 41, "ranks": [2]}
    assert [life["kind"] for life in found["history"]] == ["preempted", "hung"]
    assert main(["why", str(run.path), "--attempt", "3"]) == 1
    assert "has no attempt 3: there are 1-2" in capsys.readouterr().err


def test_a_rank_that_raised_is_named_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    written.error(run, 1, 1, "the fault")
    rank(run, 1, 0, signal="SIGKILL", ended_because="rank 1 failed", node="node1")
    headline = "rank 1 (pid 101) raised ArithmeticError: the fault"
    reason = "the same error at the same step 3 as in life 1"
    facts = {"cause": "failed", "kind": "error", "detail": headline, "rank": 1, "reason": reason}
    event(run, "end", 1, 0, **facts, requeued=False)
    text = _why(run, capsys)
    assert text.count("raised ArithmeticError: the fault") == 1
    assert 'File "train.py", line 3, in step' in text
    assert "out of memory" not in text
    assert f"what followed: not requeued: {reason}" in text
    assert f"continue with: mvit resume {run.path}" in text
    assert explain(run.path).first_failure["rank"] == 1


def test_where_ranks_were_tells_the_step_under_way_from_one_that_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    places = [("start", 0), ("data", 7), ("compute", 7), ("save", 6), ("evaluate", 6), ("log", 6), ("end", 6)]
    for number, (phase, step) in enumerate(places):
        rank(run, 1, number, signal="SIGKILL", ended_because="it", last_phase=phase, last_step=step)
    event(run, "end", 1, 0, cause="stopped", kind="cancelled", detail="cancelled", requeued=False)
    text = _why(run, capsys)
    for expected in (
        "1 rank(s) before the first step: 0",
        "1 rank(s) in step 7 (data): 1",
        "1 rank(s) in step 7 (compute): 2",
        "1 rank(s) after step 6 (save): 3",
        "1 rank(s) after step 6 (evaluate): 4",
        "1 rank(s) after step 6 (log): 5",
        "1 rank(s) leaving after step 6: 6",
    ):
        assert expected in text


def test_of_a_finished_run_it_is_not_told_where_its_ranks_were_or_why_it_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    rank(run, 1, 0, exit_code=0, last_phase="end", last_step=9)
    rank(run, 1, 1, exit_code=0, last_phase="save", last_step=9)
    facts = {"detail": "the run is complete", "reason": "a local job is not restarted by itself"}
    event(run, "end", 1, 0, cause="finished", kind="finished", requeued=False, **facts)
    text = _why(run, capsys)
    assert "rank(s)" not in text
    assert "restarted" not in text
    assert text.splitlines()[-1].endswith("finished  the run is complete")


@pytest.mark.parametrize(
    ("fault", "pid", "ago", "happened", "killed"),
    [
        ("kill@5:1", 101, 30, True, True),
        ("kill-in-save@5:1", 101, 30, True, True),
        ("slow@5:1", 101, 30, True, False),  # what killed it came later
        ("kill@5:1", 101, 3000, False, False),  # of an earlier life, with the same pid
        ("kill@5:1", 77, 30, False, False),
    ],
)
def test_a_kill_that_a_fire_drill_did_is_no_guess_about_memory(
    tmp_path: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    pid: int,
    ago: float,
    happened: bool,
    killed: bool,
) -> None:
    written.tool(slurm.folder / "dmesg", "echo nothing")
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank(run, 1, 1, signal="SIGKILL", node=node, started=time.time() - 50)
    detail = f"rank 1 on {node} (pid 101) died: killed by SIGKILL"
    event(run, "end", 1, 0, cause="failed", kind="killed", detail=detail, rank=1, requeued=False)
    mark = {"pid": pid, "time": time.time() - ago, "where": "at step 5"}
    write_json(run.path / "faults" / f"{fault}.1", mark)
    told = _why(run, capsys)
    assert main(["status", str(run.path)]) == 0
    for text in (told, capsys.readouterr().out):
        assert text.count(f"fire drill: {fault} of MVIT_FAULTS, at step 5") == happened
        assert ("out-of-memory killer" in text or "for want of memory" in text) is not killed
    assert ("somebody's kill -9" in told) is not killed
    assert [drill["fault"] for drill in explain(run.path).drills] == [fault] * happened


def test_a_fault_on_every_rank_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    for number in range(3):
        rank(run, 1, number, exit_code=85, started=time.time() - 50)
        mark = {"pid": 100 + number, "time": time.time() - 9, "where": "at step 4"}
        write_json(run.path / "faults" / f"stop@4:{number}.1", mark)
    event(run, "end", 1, 0, cause="stopped", kind="signalled", detail="told to stop", requeued=False)
    assert "  fire drill: stop@4 of MVIT_FAULTS, at step 4, on ranks 0-2" in _why(run, capsys)


@pytest.mark.parametrize(
    ("node", "kernel", "expected"),
    [
        ("here", "Out of memory: Killed process 101 (python) total-vm:9kB", "the kernel ended it for want of memory"),
        ("here", "Out of memory: Killed process 1013 (python)", "does not say that it was for want of memory"),
        ("node9", "Out of memory: Killed process 101 (python)", "grep -i 'killed process'` on node9 says so"),
    ],
)
def test_a_rank_killed_by_sigkill_is_looked_up_in_the_kernel_s_log(
    tmp_path: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    node: str,
    kernel: str,
    expected: str,
) -> None:
    written.tool(slurm.folder / "dmesg", f"echo '[  12.3] {kernel}'")
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname()) if node == "here" else node
    rank(run, 1, 1, signal="SIGKILL", node=host)
    detail = f"rank 1 on {host} (pid 101) died: killed by SIGKILL"
    event(run, "end", 1, 0, cause="failed", kind="killed", detail=detail, rank=1, requeued=False)
    assert expected in _why(run, capsys)


def test_a_lost_node_is_told_with_how_it_was_known(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run, at=-1000)
    start(run, 1, -900, hosts=("node1", "node2"), executor="slurm")
    detail = "node node2 was lost: Slurm ended the life, and node2 was not told"
    facts = {"cause": "failed", "kind": "node", "detail": detail, "blamed": ["node2"]}
    event(run, "end", 1, -400, **facts, requeued=False, reason="Slurm started the next life")
    start(run, 2, -300, hosts=("node1", "node3"), executor="slurm")
    slurm.jobs("7|RUNNING|None|2000-01-01T08:00:00|node[1,3]")
    text = _why(run, capsys)
    assert text.startswith("trial: running")
    assert ": node\n  node node2 was lost: Slurm ended the life, and node2 was not told" in text
    assert "what followed: not requeued: Slurm started the next life" not in text
    assert "what followed: Slurm started the next life" in text
    assert "blamed: node2" in text


def test_a_run_that_has_not_ended_yet_says_what_it_waits_for(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    slurm.jobs("7|PENDING|PartitionConfig|N/A|")
    text = _why(run, capsys)
    assert "it asks for more than its partition has (nodes, for one), so it will never start as it is" in text
    assert "no life has ended yet" in text
    assert text.splitlines()[-1].split() == ["1", "never", "-", "none", "pending"]


def test_a_job_cancelled_behind_our_back_is_told_as_such(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    start(run, 1, -50, executor="slurm")
    slurm.jobs()
    slurm.ended("CANCELLED")
    text = _why(run, capsys)
    assert text.startswith("trial: stopped\n")
    assert "it was cancelled in Slurm (scancel), not by `mvit cancel`" in text
    assert f"continue with: mvit resume {run.path}" in text


def test_the_failure_of_a_real_job_is_told(project: Project) -> None:
    project.submit("steps=100000")
    pids = project.wait_for_training()
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: project.status()["state"] == "failed", timeout=20)
    result = project.mvit("why", str(project.run_dir))
    assert result.returncode == 0, result.stderr
    assert f"(pid {pids[1]}) died: killed by SIGKILL" in result.stdout
    assert "rank 1 of 2 trains from step 0" in result.stdout  # the end of its log
    assert "what followed: not requeued: a local job is not restarted by itself" in result.stdout


def test_the_hang_of_a_real_job_is_told_with_the_line_it_stood_in(project: Project) -> None:
    faults = "cluster.env.MVIT_FAULTS=hang@20:1"
    result = project.submit("steps=100000", "step_s=0.1", "cluster.hang_timeout_s=3", faults, follow=True)
    assert result.returncode == 1
    assert "stood still in step 20 (compute)" in result.stderr
    told = project.mvit("why", str(project.run_dir))
    assert "fire drill: hang@20:1 of MVIT_FAULTS, at step 20" in told.stdout
    assert ": hung\n  rank 1 on " in told.stdout
    assert "1 rank(s) in step 20 (compute): 1" in told.stdout
    assert "rank_0001.stacks.txt" in told.stdout
    assert "in _hang" in told.stdout  # the line of code
    stacks = project.mvit("logs", str(project.run_dir), "--stacks").stdout
    assert stacks.count("==> ") == 2
