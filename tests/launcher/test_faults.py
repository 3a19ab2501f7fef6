"""The fire drill: each fault happens where it is asked for, as often as asked for over all lives, and nowhere else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.faults import KINDS, Fault, FaultError, observer_from_environment, parse
from tests.launcher.project import ROOT, wait_until


class Drill:
    """Lives of one rank, each a process of its own, over one run folder."""

    def __init__(self, root: Path) -> None:
        self.run_dir = root / "run"
        self.run_dir.mkdir()
        self.steps_file = root / "steps"

    def start(self, faults: str, rank: int = 0, first: int = 1, last: int = 4) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.faults"]
        command += [str(self.run_dir), str(rank), str(first), str(last), str(self.steps_file)]
        environment = {**os.environ, "MVIT_FAULTS": faults, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def live(self, faults: str, rank: int = 0, first: int = 1, last: int = 4) -> tuple[int, str]:
        """Run one life to its end; return its exit code and what it said."""
        self.steps_file.unlink(missing_ok=True)
        process = self.start(faults, rank, first, last)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def seen(self) -> list[str]:
        return self.steps_file.read_text().split() if self.steps_file.exists() else []

    def remembered(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "faults").glob("*"))


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    return Drill(tmp_path)


def test_faults_are_read_with_their_defaults() -> None:
    assert parse("kill@12:1, raise@7x3,stop@9 ,full-disk@20:0") == (
        Fault("kill", 12, 1),
        Fault("raise", 7, 0, times=3),  # rank 0 where one is needed
        Fault("stop", 9, None),
        Fault("full-disk", 20, 0),
    )
    assert parse("") == parse(" , ") == ()
    assert all(parse(f"{kind}@1") for kind in KINDS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kill", "'kill': is not of the form"),
        ("kill@12:1,boom@3", "there is no kind 'boom'"),
        ("kill@x", "'kill@x': is not of the form"),
        ("kill@-1", "is not of the form"),
        ("kill@0", "steps are counted from 1"),
        ("kill@3x0", "x0 would never happen"),
        ("kill@3,kill@3:0", "is there twice; for a fault in two lives write kill@3:0x2"),
        ("kill@3:2", "the job has the ranks 0 to 1"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_grammar(text: str, told: str) -> None:
    with pytest.raises(FaultError) as caught:
        parse(text, world_size=2)
    message = str(caught.value)
    assert told in message
    assert "kind@step[:rank][xTIMES]" in message
    assert all(kind in message for kind in KINDS)


def test_without_the_variable_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MVIT_FAULTS", raising=False)
    assert observer_from_environment(tmp_path, 0) is None
    monkeypatch.setenv("MVIT_FAULTS", "")
    assert observer_from_environment(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("kind", "code"), [("kill", -signal.SIGKILL), ("exit", 3), ("segv", -signal.SIGSEGV), ("raise", 1)]
)
def test_a_rank_ends_at_the_beginning_of_its_step_and_the_next_life_passes_it(
    drill: Drill, kind: str, code: int
) -> None:
    assert drill.live(f"{kind}@3:1", rank=0) == (0, "")  # not its rank
    assert drill.remembered() == []
    ended, errors = drill.live(f"{kind}@3:1", rank=1)
    assert ended == code
    assert drill.seen() == ["1", "2"]
    assert f"fault injection: {kind}@3:1 at step 3 (1 of 1, asked for by MVIT_FAULTS)" in errors
    assert drill.remembered() == [f"{kind}@3:1.1"]
    assert drill.live(f"{kind}@3:1", rank=1, first=2) == (0, "")
    assert drill.seen() == ["2", "3", "4"]


def test_an_exception_comes_in_as_many_lives_as_asked_with_the_same_words(drill: Drill) -> None:
    lives = [drill.live("raise@2x3") for _ in range(4)]
    assert [code for code, _ in lives] == [1, 1, 1, 0]
    last_lines = {errors.splitlines()[-1] for _, errors in lives[:3]}
    assert last_lines == {"launcher.faults.InjectedFault: the fault raise@2:0 that MVIT_FAULTS asks for"}
    assert drill.remembered() == ["raise@2:0.1", "raise@2:0.2", "raise@2:0.3"]


@pytest.mark.parametrize(("kind", "name"), [("stop", "SIGUSR2"), ("term", "SIGTERM")])
def test_a_stop_signal_comes_once_to_every_rank_or_to_the_one_named(drill: Drill, kind: str, name: str) -> None:
    for rank in (0, 1):
        assert drill.live(f"{kind}@2,{kind}@3:1", rank=rank)[0] == 0
        assert drill.seen() == ["1", name, "2", *([name] if rank == 1 else []), "3", "4"]
    assert drill.live(f"{kind}@2,{kind}@3:1", rank=1) == (0, "")
    assert drill.seen() == ["1", "2", "3", "4"]


@pytest.mark.parametrize("kind", ["hang", "spin", "freeze"])
def test_a_rank_that_hangs_goes_on_hanging_when_asked_to_stop(drill: Drill, kind: str) -> None:
    process = drill.start(f"{kind}@2")
    try:
        wait_until(lambda: drill.remembered() == [f"{kind}@2:0.1"])
        time.sleep(0.3)
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        assert process.poll() is None
        assert "2" not in drill.seen()
    finally:
        process.kill()
        process.communicate()
    assert drill.live(f"{kind}@2") == (0, "")


def test_a_slow_step_only_takes_longer(drill: Drill) -> None:
    start = time.monotonic()
    assert drill.live("slow@2")[0] == 0
    assert time.monotonic() - start > 5
    assert drill.seen() == ["1", "2", "3", "4"]


def test_what_has_happened_says_when_and_where(drill: Drill) -> None:
    before = time.time()
    drill.live("exit@3")
    record = json.loads((drill.run_dir / "faults" / "exit@3:0.1").read_text())
    assert before <= record["time"] <= time.time()
    assert record["where"] == "at step 3"


# --- in a save: with the real one, in a process of its own, since its functions are replaced ------------------

_SAVES = """
import sys
from pathlib import Path
import torch
from launcher.faults import observer_from_environment
from mvit import distributed
from mvit.checkpoint import list_steps
from mvit.checkpoint_save import Contents, Saver
from mvit.fragments import MASTER, MOMENTS, Fragment

run_dir = Path(sys.argv[1])
observer = observer_from_environment(run_dir, 0)
saver = Saver(run_dir, distributed.start())
for step in (10, 20, 30):
    states = {state: torch.full((15,), float(step)) for state in (MASTER, *MOMENTS)}
    fragment = Fragment("weight", 15, 0, states, True, states[MASTER])
    saver.begin(step, Contents([fragment], {"weight": [5, 3]}, [], {"counters": {}}))
    for outcome in saver.finish():
        print(outcome.step, outcome.error or "saved", flush=True)
saver.close()
"""


def _save(run_dir: Path, faults: str) -> tuple[int, list[str]]:
    environment = {**os.environ, "MVIT_FAULTS": faults, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SAVES, str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()


def test_faults_of_a_save_hit_the_first_one_at_or_after_their_step(tmp_path: Path) -> None:
    faults = "full-disk@11,kill-in-save@21"
    code, told = _save(tmp_path, faults)
    assert code == -signal.SIGKILL
    assert told[0] == "10 saved"
    assert told[1].startswith("20 ")
    assert "No space left on device" in told[1]
    assert len(told) == 2
    (left,) = (tmp_path / "checkpoints").glob(".step_00000030*")
    assert (left / "rank_00000.safetensors").exists(), "it died within its file"
    assert _save(tmp_path, faults) == (0, ["10 saved", "20 saved", "30 saved"])
    assert sorted(path.name for path in (tmp_path / "faults").iterdir()) == ["full-disk@11:0.1", "kill-in-save@21:0.1"]
