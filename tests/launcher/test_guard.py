"""The guard of one rank, as a process of its own: signals, suspension, a full disk, a hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.preemption import EXIT_HUNG, EXIT_STOPPED
from launcher.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
START = """
import signal, sys, time
from launcher.heartbeat import own_heartbeat
from launcher.stacks import register_dump
heartbeat, asked = own_heartbeat(), []
def begin():
    for signum in (signal.SIGUSR2, signal.SIGTERM): signal.signal(signum, lambda *_: asked.append(1))
    register_dump()
    heartbeat.beat(0, "start")
"""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system without a free byte."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield small
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def _fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(folder).free == 0


def _guard(run_dir: Path, body: str, hang_s: int = 0, log: Path | None = None) -> subprocess.Popen[str]:
    """Start a guard whose rank runs START and `body`; what it says comes through a pipe, or goes to a file."""
    place = {"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_JOB_ID": str(os.getpid())}
    guard = [sys.executable, "-m", "launcher.guard", str(run_dir), "1", str(hang_s), "60"]
    return subprocess.Popen(
        [*guard, sys.executable, "-c", START + body],
        env=os.environ | place | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE if log is None else os.open(log, os.O_WRONLY | os.O_CREAT),
        text=True,
    )


def _record(run_dir: Path) -> dict[str, object]:
    return json.loads((RunFolder(run_dir).attempt_dir(1) / "rank_0000.json").read_text())


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM])
def test_a_stop_signal_before_the_rank_has_handlers_reaches_it_once_it_has(
    tmp_path: Path, signum: signal.Signals
) -> None:
    ready = tmp_path / "ready"
    body = f"""
open({str(ready)!r}, "w").close()
time.sleep(1.5)  # importing: stop signals are ignored
begin()
end = time.monotonic() + 10
while not asked and time.monotonic() < end: time.sleep(0.05)
sys.exit({EXIT_STOPPED} if asked else 3)
"""
    guard = _guard(tmp_path / "run", body)
    _wait_for(ready)
    guard.send_signal(signum)
    assert (guard.wait(timeout=30), guard.communicate()[1]) == (EXIT_STOPPED, "")
    record = _record(tmp_path / "run")
    assert [sent["name"] for sent in record["signals"]] == [signum.name]  # pyright: ignore


STEPS = """
begin()
for step in range(1, 6):
    heartbeat.beat(step, "compute"); time.sleep(0.4)
"""


def test_a_job_that_slurm_suspends_for_longer_than_its_limit_does_not_hang(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    body = (
        STEPS
        + f"""
open({str(ready)!r}, "w").close()
for step in range(6, 16):
    heartbeat.beat(step, "compute"); time.sleep(0.4)
"""
    )
    guard = _guard(tmp_path / "run", body, hang_s=3)
    _wait_for(ready)
    both = (guard.pid, int(_record(tmp_path / "run")["pid"]))  # pyright: ignore
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    assert (guard.wait(timeout=30), guard.communicate()[1]) == (0, "")


def test_a_hang_on_a_full_disk_is_ended_and_its_stacks_are_printed(full_disk: Path) -> None:
    ready = full_disk.parent / "ready"
    body = (
        STEPS
        + f"""
open({str(ready)!r}, "w").close()
def stands_still(): time.sleep(60)
stands_still()
"""
    )
    guard = _guard(full_disk / "run", body, hang_s=3)
    _wait_for(ready)
    _fill(full_disk)
    told = guard.communicate(timeout=30)[1]
    assert guard.returncode == EXIT_HUNG
    assert "lacks the mark of this hang: [Errno 28] No space left on device" in told
    assert "in stands_still" in told


def test_a_full_disk_costs_a_rank_neither_its_life_nor_its_exit_code(full_disk: Path) -> None:
    (full_disk / "run").mkdir()
    _fill(full_disk)
    guard = _guard(full_disk / "run", "begin(); time.sleep(1); sys.exit(86)")
    told = guard.communicate(timeout=30)[1]
    assert guard.returncode == 86
    assert "lacks its record: [Errno 28]" in told
    assert "lacks the mark of this failure: [Errno 28]" in told


def test_a_guard_whose_own_log_is_on_the_full_disk_lives_on(full_disk: Path) -> None:
    ready = full_disk.parent / "ready"
    body = f"begin(); open({str(ready)!r}, 'w').close(); time.sleep(2); sys.exit(86)"
    guard = _guard(full_disk / "run", body, log=full_disk / "log")
    _wait_for(ready)
    _fill(full_disk)
    guard.send_signal(signal.SIGUSR2)  # its record cannot be written, and that cannot be told
    assert guard.wait(timeout=30) == 86
