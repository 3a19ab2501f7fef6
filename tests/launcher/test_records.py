"""Records that survive kills, processes that are told apart, and a display of what was recorded."""

import io
import os
import signal
import subprocess
from pathlib import Path

from rich.console import Console

from launcher.follow import RecordTail
from launcher.processes import ProcessIdentity, identify, identity_from, is_alive, send_signal
from launcher.run_folder import append_json_line, read_json_lines
from mvit.progress import ProgressDisplay, format_duration

TRAIN = {"kind": "train", "step": 10, "total_steps": 40, "loss": 1.23456, "lr": 1e-3, "samples_per_s": 8.5, "eta_s": 75}


def test_a_line_cut_off_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    append_json_line(path, {"attempt": 1})
    with path.open("a") as file:
        file.write('{"attempt": 2, "ev')  # killed here
    append_json_line(path, {"attempt": 3})
    assert [record["attempt"] for record in read_json_lines(path)] == [1, 3]


def test_a_signal_never_reaches_another_process_with_the_same_pid() -> None:
    child = subprocess.Popen(["sleep", "60"])
    identity = identify(child.pid)
    assert identity is not None
    assert identity_from(identity.to_dict()) == identity
    for stranger in (
        ProcessIdentity(identity.pid, identity.start_ticks - 1, identity.boot_id, identity.host),
        ProcessIdentity(identity.pid, identity.start_ticks, "another boot", identity.host),
        ProcessIdentity(identity.pid, identity.start_ticks, identity.boot_id, "another host"),
    ):
        assert not send_signal(stranger, signal.SIGKILL)
    assert child.poll() is None
    assert is_alive(identity)
    assert send_signal(identity, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert not is_alive(identity)
    child.wait()


def test_following_shows_each_record_once_though_a_restart_rewrites_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = RecordTail(path)
    assert tail.read() == []
    for step in (1, 2, 3):
        append_json_line(path, {"step": step, "time": float(step)})
    assert [record["step"] for record in tail.read()] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "ti')  # not finished yet
    assert tail.read() == []

    rewritten = tmp_path / "new"
    append_json_line(rewritten, {"step": 1, "time": 1.0})
    append_json_line(rewritten, {"step": 2, "time": 9.0})  # done again by the next life
    rewritten.replace(path)
    assert tail.read() == [{"step": 2, "time": 9.0}]


def test_without_a_terminal_each_record_is_one_plain_line() -> None:
    text = io.StringIO()
    with ProgressDisplay(console=Console(file=text, width=20)) as display:
        display.update(TRAIN)
        display.update({"kind": "progress", "step": 1, "total_steps": 2})
        display.update({"kind": "evaluate", "step": 10, "total_steps": 40, "top1": 0.5, "time": 1.0})
        display.note("[not] markup")
    assert text.getvalue().splitlines() == [
        "step 10/40  loss 1.2346  lr 1.00e-03  8.5 samples/s  ETA 1:15",
        "evaluate at step 10: top1 0.5",
        "[not] markup",
    ]


def test_on_a_terminal_the_bar_shows_step_loss_lr_speed_and_eta() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140, color_system=None)
    with ProgressDisplay(total_steps=40, console=console) as display:
        display.update(TRAIN)
    for shown in ("step 10/40", "loss 1.2346", "lr 1.00e-03", "8.5 samples/s", "ETA 1:15"):
        assert shown in text.getvalue()


def test_durations_are_readable() -> None:
    assert [format_duration(seconds) for seconds in (5, 75.4, 3723)] == ["0:05", "1:15", "1:02:03"]
