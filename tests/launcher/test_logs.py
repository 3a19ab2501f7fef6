"""`mvit logs`: the right file of the right life, as it grows, through requeues; and what there is instead."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.logs import last_lines, number_ranges
from launcher.run_folder import RunFolder
from tests.launcher import written
from tests.launcher.project import ROOT, Project, wait_until
from tests.launcher.written import FakeSlurm, create, event, in_slurm, log, start

slurm = written.slurm


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run with two lives of two ranks, the second without a log of rank 1."""
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    log(run, 1, 0, "one\ntwo\rtwo and a half\nthree\n")
    log(run, 1, 1, "other")
    event(run, "end", 1, -50, cause="failed", detail="broke", requeued=True)
    start(run, 2, -40)
    log(run, 2, 0, "second life\n")
    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "second life\n"),
        (["--attempt", "1"], "one\ntwo\rtwo and a half\nthree\n"),
        (["--attempt", "1", "--lines", "1"], "three\n"),
        (["--attempt", "1", "--rank", "1"], "other\n"),
        (["--rank", "1"], "other\n"),  # the newest life that has a log of it
        (["--attempt", "1", "--all", "--lines", "1"], "[0] three\n[1] other\n"),
    ],
)
def test_the_log_asked_for_is_printed(
    run: RunFolder, options: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run.path), *options]) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "9"], "attempt 2 of {run} has no log of rank 9: there are those of rank(s) 0."),
        (["--rank", "1", "--attempt", "2"], "attempt 2 of {run} has no log of rank 1: there are those of rank(s) 0."),
        (["--attempt", "5"], "attempt 5 of {run} has no log of rank 0: attempt(s) 1-2 have."),
        (["--attempt", "5", "--follow"], "attempt 5 of {run} has no log of rank 0: attempt(s) 1-2 have."),
        (["--stacks"], "{run} has no stacks: they are dumped when a rank hangs, and none was found hanging."),
        (["--stacks", "--follow"], "leave one of the two out"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    run: RunFolder, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run.path), *options]) == 1
    assert message.format(run=run.path) in capsys.readouterr().err


def test_a_run_that_waits_in_the_queue_has_no_logs_yet(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    slurm.jobs("7|PENDING|Resources|N/A|")
    assert main(["logs", str(run.path)]) == 1
    message = capsys.readouterr().err
    assert f"{run.path} has no log yet: it is pending: Slurm says PENDING (Resources)" in message
    assert "; queued for 60 s. See also" in message
    assert f"mvit why {run.path}" in message
    assert main(["logs", str(tmp_path / "nowhere")]) == 1


@pytest.mark.parametrize("options", [[], ["--all"]])
def test_a_run_whose_ranks_have_not_written_yet_says_what_it_does_instead(
    tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -42)
    for number in (0, 1):
        log(run, 1, number, "")  # the guard opens them before its rank starts
    assert main(["logs", str(run.path), *options]) == 0
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "empty so far: the run is running; starting for 4" in shown.err
    assert " s: imports, process group, model, data" in shown.err
    log(run, 1, 0, "a word\n")
    assert main(["logs", str(run.path), "--lines", "0"]) == 0
    assert capfd.readouterr().err == ""


def test_stacks_of_all_ranks_stand_under_their_files(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 3):
        (run.attempt_dir(2) / f"rank_{number:04d}.stacks.txt").write_text(f"stack of {number}\n")
    assert main(["logs", str(run.path), "--stacks"]) == 0
    shown = capsys.readouterr().out
    assert f"==> {run.attempt_dir(2)}/rank_0003.stacks.txt <==\nstack of 3\n" in shown
    assert main(["logs", str(run.path), "--stacks", "--rank", "3"]) == 0
    assert capsys.readouterr().out == "stack of 3\n"


def test_the_batch_script_s_output_is_found_from_a_requeued_life(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.submitit_dir(1)  # the second life has none of its own
    folder.mkdir(parents=True)
    (folder / "4711_0_log.out").write_text("rc=85, requeue\n")
    (folder / "4711_1_log.err").write_text("srun: error\n")
    (folder / "4711_0_result.pkl").write_bytes(b"\x80")
    assert main(["logs", str(run.path), "--submitit"]) == 0
    shown = capsys.readouterr().out
    assert "rc=85, requeue\n" in shown
    assert "srun: error\n" in shown
    assert main(["logs", str(run.path), "--submitit", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "srun: error\n"


def test_following_goes_on_with_the_next_life_and_ends_with_the_run(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)  # in the process of this test, which lives
    log(run, 1, 0, "".join(f"line {number}\n" for number in range(50)))
    log(run, 1, 1, "other\n")
    command = [sys.executable, "-m", "launcher.cli", "logs", str(run.path), "--follow", "--all"]
    following = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert following.stdout is not None
    first = [following.stdout.readline() for _ in range(21)]
    log(run, 1, 0, "unfinished")
    time.sleep(0.5)
    log(run, 1, 0, " business\nlast words")
    event(run, "end", 1, 0, cause="stopped", kind="signalled", detail="told to stop", requeued=True)
    time.sleep(0.7)
    start(run, 2, 0)
    log(run, 2, 0, "second life\n")
    time.sleep(0.7)
    event(run, "end", 2, 0, cause="finished", detail="", requeued=False)
    rest, notes = following.communicate(timeout=20)
    assert following.returncode == 0
    assert first == [*(f"[0] line {number}\n" for number in range(30, 50)), "[1] other\n"]
    assert rest == "[0] unfinished business\n[0] last words\n[0] second life\n"
    assert "--- attempt 2" in notes
    assert notes.endswith("--- the run is finished\n")


def test_following_a_run_that_starts_says_so_once_and_then_shows_its_words(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    log(run, 1, 0, "")
    command = [sys.executable, "-m", "launcher.cli", "logs", str(run.path), "--follow"]
    following = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert following.stderr is not None
    assert following.stderr.readline().startswith("--- running; starting for 6")
    time.sleep(1.0)
    log(run, 1, 0, "a word\n")
    time.sleep(0.7)
    event(run, "end", 1, 0, cause="finished", detail="", requeued=False)
    shown, notes = following.communicate(timeout=20)
    assert (shown, notes) == ("a word\n", "--- the run is finished\n")


def test_following_a_job_shows_what_its_rank_prints(project: Project) -> None:
    project.submit("steps=40")
    wait_until(lambda: (project.run_dir / "logs").exists())
    result = project.mvit("logs", str(project.run_dir), "--rank", "1", "--follow")
    assert result.returncode == 0, result.stderr
    assert "rank 1 of 2 trains from step 0" in result.stdout
    assert "--- the run is finished" in result.stderr


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nb", "a\nb\n", "a\n\nb\n\n", "a\r\nb\n"])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_last_lines_are_the_last_ones(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    lines = text.removesuffix("\n").split("\n") if text else []
    assert last_lines(path, count) == (lines[-count:] if count else [])


def test_the_last_lines_of_a_large_file_are_found_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"{number} " + "x" * (number % 997) for number in range(2000)]
    path.write_text("\n".join(lines) + "\n")
    for count in (1, 100, 300, 1999, 3000):
        assert last_lines(path, count) == lines[-count:]


def test_numbers_are_written_as_ranges() -> None:
    assert number_ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"
    assert number_ranges([]) == ""
