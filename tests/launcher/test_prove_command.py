"""`mvit prove-resume` as a user calls it: what it prints, refuses, keeps, and that it leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import launcher.prove
from launcher import cli
from launcher.prove import ProofError, plan_proof
from launcher.prove_ranks import RankEnd, StalledError, failure_of, run_ranks
from mvit.trace import trace_file

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "configs" / "demo" / "digits.yaml")
TINY = ("model.embed_dim=16", "model.depths=[1,1,1,1]", "train.global_batch_size=16", "train.micro_batch_size=4")


def _settings(digits: Path, out: Path) -> list[str]:
    data = [f"data.{key}={digits}/{key}" for key in ("train", "validation")]
    return [RECIPE, *TINY, *data, f"output_dir={out}", "optim.ema_decay=0.9", "schedule.warmup_epochs=0"]


# --- on real processes ----------------------------------------------------------------------------------------


def _prove(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "prove-resume", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.timeout(900)
def test_a_recipe_that_is_killed_and_resumed_is_bit_identical(digits: Path, tmp_path: Path) -> None:
    done = _prove(*_settings(digits, tmp_path), "--ranks", "2", "--steps", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed by SIGKILL in the middle of step 4" in done.stdout
    assert "BIT-IDENTICAL: 6 steps, 96 samples, " in done.stdout
    assert "killed at step 4, resumed from step 2" in done.stdout
    assert not list(tmp_path.iterdir()), "the temporary runs were left behind"


@pytest.mark.timeout(900)
def test_a_recipe_continues_on_fewer_ranks_at_another_stage(digits: Path, tmp_path: Path) -> None:
    settings = [*_settings(digits, tmp_path), "--ranks", "2", "--steps", "6", "--keep", "--json"]
    done = _prove(*settings, "--resume-ranks", "1", "--resume-with", "zero.stage=3", "zero.persistence_threshold=0")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["verdict"], verdict["ok"]) == ("EQUIVALENT", True)
    assert 0 < verdict["loss_difference"] < verdict["tolerance"] == 1e-4
    assert (verdict["killed_at"], verdict["resumed_from"], verdict["num_samples"]) == (4, 2, 96)
    kept = Path(verdict["work"])
    assert str(kept) in done.stderr
    assert not trace_file(kept / "resumed" / "traces", 1).exists()
    assert trace_file(kept / "killed" / "traces", 1).exists()


@pytest.mark.timeout(900)
def test_a_run_that_fails_by_itself_is_no_verdict_and_its_words_are_shown(digits: Path, tmp_path: Path) -> None:
    done = _prove(*_settings(digits, tmp_path), "train.precision=fp16")
    assert done.returncode == 1
    assert "the undisturbed run failed, before anything was resumed: rank 0: ConfigError" in done.stderr
    assert "fp16 does not run on CPUs" in done.stderr
    (kept,) = tmp_path.iterdir()
    assert f"the runs are kept in {kept}" in done.stderr


# --- what is refused before time is lost ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranks": 3}, "train.global_batch_size = 16 is not micro_batch_size x ranks"),
        ({"ranks": 2, "resume_ranks": 3}, "train.global_batch_size = 16 is not micro_batch_size x ranks"),
        ({"ranks": -1}, "--ranks -1: a run has at least one rank"),
        ({"steps": 3}, "--steps 3: a proof needs at least 4 steps"),
        ({"kill_at": 13}, "--kill-at 13: the run must be killed in one of the steps 2 to 12"),
        ({"kill_at": 1}, "--kill-at 1: the run must be killed in one of the steps 2 to 12"),
        ({"resume_with": ["optim.lr=1"]}, "--resume-with changes what the run computes: optim.lr: 0.002 -> 1.0"),
        ({"settings": ["data.train=nowhere"]}, "data.train = nowhere: "),
        ({"settings": ["data.validation=nowhere"]}, "data.validation = nowhere: "),
        ({"settings": ["data.train=null"]}, "data.train is not set"),
        ({"settings": ["model.num_classes=9"]}, "9"),
        ({"settings": ["schedule.epochs=0.03"]}, "--steps 2 (the whole run has 2): a proof needs at least 4 steps"),
    ],
)
def test_what_cannot_be_proven_is_refused_before_anything_runs(
    digits: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    recipe, *settings = _settings(digits, tmp_path)
    changed = [*settings, *options.pop("settings", [])]
    with pytest.raises(ValueError, match=r".") as caught:
        plan_proof(recipe, changed, **options)
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_gpus_are_refused(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.prove, "count_gpus", lambda: 2)
    recipe, *settings = _settings(digits, tmp_path)
    assert plan_proof(recipe, settings).ranks == 2
    with pytest.raises(ProofError, match=r"--ranks 4: this machine shows 2 GPU\(s\)"):
        plan_proof(recipe, settings, ranks=4)


def test_a_short_run_is_proven_whole_and_bits_are_expected_unless_sums_change(digits: Path, tmp_path: Path) -> None:
    recipe, *settings = _settings(digits, tmp_path)
    short = plan_proof(recipe, [*settings, "schedule.epochs=0.1"])
    assert (short.steps, short.total_steps, short.kill_at, short.ranks, short.changes) == (9, 9, 6, 1, ())
    assert plan_proof(recipe, settings, resume_with=["data.num_workers=2"]).changes == ()
    assert plan_proof(recipe, settings, resume_with=["zero.stage=0"]).changes == ("zero.stage 2 -> 0",)
    assert plan_proof(recipe, settings, ranks=1, resume_ranks=2).changes == ("1 -> 2 ranks",)


# --- the verdicts of the command, with stand-ins for the ranks ------------------------------------------------


def _stand_in(resumed_lr: float = 0.1, error: str = "") -> Callable[..., list[RankEnd]]:
    """Return a `run_ranks` that writes the traces of one rank; `error` is what the resumed run refuses with."""

    def ranks(command: Sequence[str], world_size: int, folder: Path, **options: Any) -> list[RankEnd]:
        plan = json.loads((folder / "plan.json").read_text())
        traces = Path(plan["traces"])
        traces.mkdir()
        killed, resumed = plan["kill_at"] is not None, folder.name == "resumed"
        if resumed and error:
            told = {"rank": 0, "time": 1.0, "type": "CheckpointError", "message": error}
            (folder / "rank_0000.error.json").write_text(json.dumps(told))
            return [RankEnd(0, 86)]
        first, last = (4 if resumed else 0), (plan["kill_at"] - 1 if killed else plan["steps"])
        lines = [{"kind": "start", "step": first, "facts": {"rng": {"cpu": f"r{first}"}}}]
        for step in range(first + 1, last + 1):
            lr = resumed_lr if resumed else 0.1
            facts = {"rng": {"cpu": f"r{step}"}, "sample": {"chunk 0": ["a"]}, "lr": {"learning rate": lr.hex()}}
            lines.append({"kind": "step", "step": step, "facts": facts})
        trace_file(traces, 0).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if killed:
            (traces / "killed").touch()
        return [RankEnd(0, -signal.SIGKILL if killed else 0)]

    return ranks


def _called(digits: Path, out: Path, *options: str) -> int:
    return cli.main(["prove-resume", *_settings(digits, out), "--ranks", "1", *options])


def test_a_difference_is_exit_code_1_and_the_runs_are_kept_and_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher.prove, "run_ranks", _stand_in(resumed_lr=0.2))
    assert _called(digits, tmp_path) == 1
    told = capsys.readouterr().out
    (kept,) = tmp_path.iterdir()
    assert "NOT IDENTICAL: 12 steps" in told
    assert "first difference: step 5, rank 0: lr: learning rate" in told
    assert "wanted        0.1 (0x1.999999999999ap-4)" in told
    assert f"kept in {kept}" in told
    assert _called(digits, tmp_path, "--json") == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["ok"], verdict["difference"]["kind"], verdict["difference"]["step"]) == (False, "lr", 5)


def test_a_resume_that_refuses_to_train_is_not_identical_in_its_own_words(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher.prove, "run_ranks", _stand_in(error="exp_avg of head differs from what was saved"))
    assert _called(digits, tmp_path) == 1
    told = capsys.readouterr().out
    assert "NOT IDENTICAL" in told
    assert "CheckpointError: exp_avg of head differs from what was saved" in told


def test_the_runs_lie_where_they_are_told_to_and_go_on_success(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher.prove, "run_ranks", _stand_in())
    work = tmp_path / "scratch"
    work.mkdir()
    (work / "mine").touch()
    assert _called(digits, tmp_path, "--work", str(work)) == 0
    assert [path.name for path in work.iterdir()] == ["mine"]
    assert _called(digits, tmp_path, "--work", str(work), "--keep") == 0
    assert len(list(work.iterdir())) == 2
    assert "BIT-IDENTICAL" in capsys.readouterr().out


# --- the ranks as processes -----------------------------------------------------------------------------------

_WORKER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
_SLEEP = "import time; print('asleep', flush=True); time.sleep(600)"


def _script(rank_1: str) -> list[str]:
    """Return a command whose rank 0 sleeps for ever beside a worker, and whose rank 1 does something else."""
    code = f"import os\nif os.environ['RANK'] == '1':\n    {rank_1}\n{_WORKER}{_SLEEP}"
    return [sys.executable, "-c", code]


def _left_over() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def _gone(text: str) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        if not any(text in command for command in commands):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("rank_1", "code", "told"),
    [
        ("raise SystemExit(3)", 3, "rank 1 ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", -9, "rank 1 was killed by SIGKILL, not by the proof: often the kernel's out-of"),
        ("os.kill(os.getpid(), 11)", -11, "rank 1 was killed by SIGSEGV"),
    ],
)
def test_a_rank_that_fails_takes_the_others_and_their_workers_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_1: str, code: int, told: str
) -> None:
    monkeypatch.setattr("launcher.prove_ranks.GRACE_S", 0.5)
    before = _left_over()
    mark = f"# {tmp_path}"
    command = _script(rank_1)
    command[-1] = command[-1].replace("time.sleep(600)'", f"time.sleep(600){mark}'")
    ends = run_ranks(command, 2, tmp_path, stall_s=60, tick=lambda: 0)
    assert ends == [RankEnd(0, None), RankEnd(1, code)]
    assert told in failure_of(tmp_path, ends)
    assert _left_over() == before
    assert _gone(mark)


def test_ranks_that_hang_are_ended_and_what_they_said_last_is_kept(tmp_path: Path) -> None:
    before = _left_over()
    with pytest.raises(StalledError, match="no rank did anything for 1 s"):
        run_ranks([sys.executable, "-c", _SLEEP], 2, tmp_path, stall_s=1, tick=lambda: 0)
    assert _left_over() == before
    assert "asleep" in failure_of(tmp_path, [])


def test_a_command_that_is_killed_leaves_no_rank_behind(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.prove_ranks import run_ranks; "
        f"run_ranks([sys.executable, '-c', {_SLEEP!r}, '{tmp_path}'], 2, Path('{tmp_path}'), "
        "stall_s=99, tick=lambda: 0)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    logs = [tmp_path / f"rank_{rank:04d}.log" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(log.exists() and "asleep" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert _gone(str(tmp_path))
