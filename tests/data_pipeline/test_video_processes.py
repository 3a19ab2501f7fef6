"""Looking videos over in processes: whatever a video does to its process costs that video and nothing else."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_pipeline.video_inspect import Finding, Inspection, inspect
from data_pipeline.video_processes import ProcessError, inspect_all
from tests.data_pipeline.clips import clip


@pytest.fixture
def videos(tmp_path: Path) -> list[Inspection]:
    """Return 8 videos; number 3 is a pipe that nobody writes to, so that whoever reads it is stuck."""
    for number in range(8):
        path = tmp_path / f"{number}.mp4"
        if number == 3:
            os.mkfifo(path)
        else:
            path.write_bytes(clip(4 + number))
    # Sizes are asked for first, and a pipe has none.
    return [Inspection(str(tmp_path / f"{number}.mp4"), size=None if number != 3 else 1000) for number in range(8)]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def open_files(process: psutil.Process) -> list[str]:
    return [os.path.realpath(handle) for handle in Path(f"/proc/{process.pid}/fd").iterdir()]


def when_one_is_stuck(pipe: str, act: Callable[[int], None]) -> threading.Thread:
    """Call `act` with the process that waits for something to read from the pipe."""

    def watch() -> None:
        for _ in range(600):
            time.sleep(0.05)
            try:
                writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # succeeds once somebody reads
            except OSError:
                continue
            reading: list[psutil.Process] = []
            while not reading:  # its own open may not have returned yet
                reading = [child for child in children() if pipe in open_files(child)]
            for child in reading:
                act(child.pid)
            os.close(writing)
            return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_crashes_costs_its_video_and_is_replaced(
    videos: list[Inspection], number: signal.Signals
) -> None:
    killer = when_one_is_stuck(videos[3].path, lambda process: os.kill(process, number))
    found = list(inspect_all(videos, workers=2, time_limit_s=60))
    killer.join()
    assert [task for task, _ in found] == videos
    problems = {place: finding.problem for place, (_, finding) in enumerate(found) if finding.problem}
    assert set(problems) == {3}
    assert f"the process that decoded it was ended by {number.name}" in str(problems[3])
    assert [finding.facts.num_frames for _, finding in found if finding.facts] == [4, 5, 6, 8, 9, 10, 11]
    assert not children()


def test_a_video_that_takes_for_ever_is_given_up(videos: list[Inspection]) -> None:
    found = list(inspect_all(videos, workers=1, time_limit_s=3))
    assert [finding.problem for _, finding in found if finding.problem] == ["decoding it took longer than 3 s"]


def test_a_process_that_dies_without_a_video_is_replaced_and_nobody_notices(videos: list[Inspection]) -> None:
    del videos[3]

    def coming() -> Iterator[Inspection]:
        for number, video in enumerate(videos):
            if number == 3:  # the one worker has nothing to do but to wait for this
                [idle] = children()
                idle.kill()
                idle.wait()
            yield video

    found = list(inspect_all(coming(), workers=1))
    assert [task for task, _ in found] == videos
    assert not [finding.problem for _, finding in found if finding.problem]


def test_a_replacement_that_dies_before_it_begins_costs_nothing(videos: list[Inspection]) -> None:
    """As on a node that is short of memory for a moment, in hour 40."""

    def kill_it_and_the_next(process: int) -> None:
        before = {child.pid for child in children()}
        os.kill(process, signal.SIGKILL)
        for _ in range(1000):
            for child in children():
                if child.pid not in before:
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.005)

    killer = when_one_is_stuck(videos[3].path, kill_it_and_the_next)
    found = [finding.problem for _, finding in inspect_all(videos, workers=1)]
    killer.join()
    assert [number for number, problem in enumerate(found) if problem] == [3]


def test_an_error_that_nobody_thought_of_is_a_finding(tmp_path: Path) -> None:
    [(_, finding)] = inspect_all([Inspection(str(tmp_path))], workers=1, work=_stumble)
    assert finding.problem == "KeyError: 'nobody thought of this'"


def test_a_slow_video_holds_up_neither_the_others_nor_what_comes_after_it() -> None:
    tasks = [Inspection("slow" if number == 0 else str(number)) for number in range(30)]
    found = list(inspect_all(tasks, workers=2, work=_dawdle))
    assert [task for task, _ in found] == tasks
    assert [finding.problem for _, finding in found] == [task.path for task in tasks]


def _dawdle(task: Inspection) -> Finding:
    time.sleep(2 if task.path == "slow" else 0)
    return Finding(task.path)


def _stumble(task: Inspection) -> Finding:
    raise KeyError("nobody thought of this")


def test_processes_that_cannot_begin_are_an_error_not_bad_videos(
    videos: list[Inspection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "av.py").write_text("raise SystemExit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ProcessError, match="ended before it began"):
        list(inspect_all(videos[:2], workers=1))


def test_leaving_half_way_ends_the_processes(videos: list[Inspection]) -> None:
    results = inspect_all(videos, workers=2)
    next(results)
    assert children()
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not children()


def test_unreadable_and_enormous_files_are_named(tmp_path: Path) -> None:
    assert "cannot be read: [Errno 2]" in str(inspect(Inspection(str(tmp_path / "gone.mp4"))).problem)
    with open(tmp_path / "sparse.mp4", "wb") as file:
        file.truncate(3_000_000_000)
    assert "3,000,000,000 bytes, more than" in str(inspect(Inspection(str(tmp_path / "sparse.mp4"))).problem)
