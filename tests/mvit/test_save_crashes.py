"""A save may die at any point, on any rank, or fail on the disk: a valid checkpoint is always there to resume from."""

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mvit.checkpoint
import mvit.checkpoint_files
import mvit.checkpoint_save
from launcher.processes import free_port
from mvit import distributed
from mvit.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints_dir,
    list_steps,
    newest_valid,
    publications,
    read_manifest,
    verify,
)
from mvit.checkpoint_load import whole_weights
from mvit.checkpoint_save import Contents, Outcome, Saver
from mvit.fragments import MASTER, MOMENTS, Fragment
from mvit.retention import Retention, clear_leftovers

WORLD = 2
SHAPES = {"weight": [5, 3], "bias": [3]}


def _contents(rank: int, value: float) -> Contents:
    """Return a state whose elements all are `value`; rank 1 owns the end of the weight and the bias."""
    pieces = {0: [("weight", 15, 0, 9)], 1: [("weight", 15, 9, 6), ("bias", 3, 0, 3)]}[rank]
    fragments = [
        Fragment(
            name,
            numel,
            start,
            {state: torch.full((count,), value) for state in (MASTER, *MOMENTS)},
            False,
            torch.full((count,), value),
        )
        for name, numel, start, count in pieces
    ]
    return Contents(fragments, SHAPES, [], {"counters": {}})


# --- what runs on the ranks -----------------------------------------------------------------------------------


def _rank(rank: int, port: int, folder: Path, die_at: tuple[int, int] | None, points: Any) -> None:
    """Save steps 10, 20 and 20 again; die at the n-th point of rank r's later saves, or report the points."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = distributed.start()
    saver = Saver(folder, ranks, Retention(keep_last=1))
    passed: list[str] = []
    watching = False

    def at_point(name: str) -> None:
        if watching:
            if die_at == (rank, len(passed)):
                os.kill(os.getpid(), signal.SIGKILL)
            passed.append(name)

    mvit.checkpoint_files.at_point = mvit.checkpoint_save.at_point = at_point
    for step, value in ((10, 1.0), (20, 2.0), (20, 3.0)):  # the second 20 replaces the first, as after a fall-back
        watching = step == 20
        saver.begin(step, _contents(rank, value))
        saver._join(hurry=False)  # until it is read back, too
    points.put((rank, passed))
    saver.close()


@pytest.fixture(scope="module")
def spawn() -> Callable[..., Any]:
    """Start two ranks from a process that has imported everything already, which makes a case cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.mvit.test_save_crashes"])

    def start(folder: Path, die_at: tuple[int, int] | None) -> tuple[list[Any], Any]:
        points, port = context.SimpleQueue(), free_port()
        ranks = [context.Process(target=_rank, args=(r, port, folder, die_at, points)) for r in range(WORLD)]
        for process in ranks:
            process.start()
        return ranks, points

    return start


@pytest.mark.timeout(900)
def test_after_a_kill_at_any_write_point_a_whole_checkpoint_is_found(spawn: Callable[..., Any], tmp_path: Path) -> None:
    """The points are enumerated by a run that is not killed; then every one of them is died at, on each rank."""
    ranks, points = spawn(tmp_path / "undisturbed", None)
    passed = dict(points.get() for _ in ranks)
    for process in ranks:
        process.join()
    assert set(passed[0]) >= {"folder made", "shard begun", "piece written", "shard synced", "manifest written"}
    assert set(passed[0]) >= {"manifest synced", "old one moved aside", "renamed", "listed", "read back"}
    assert "manifest written" not in passed[1], "rank 1 publishes nothing"
    assert list_steps(tmp_path / "undisturbed") == [20]
    assert publications(tmp_path / "undisturbed")[-1]["read_back"]
    landed = []
    for rank, names in passed.items():
        for index, name in enumerate(names):
            folder = tmp_path / f"{rank}-{index}"
            processes, _ = spawn(folder, (rank, index))
            deadline = time.monotonic() + 120
            while processes[rank].exitcode is None and time.monotonic() < deadline:
                time.sleep(0.01)
            for process in processes:
                process.kill()
                process.join()
            where = f"killed on rank {rank} at {name!r} ({index})"
            assert processes[rank].exitcode == -signal.SIGKILL, where
            clear_leftovers(folder)  # as the next attempt does
            newest = newest_valid(folder)
            assert newest is not None, where
            step = read_manifest(newest).step
            values = {float(v) for _, tensor in whole_weights(newest) for v in tensor.flatten()}
            assert values in ([{1.0}] if step == 10 else [{2.0}, {3.0}]), where
            landed.append(step)
            assert not list(checkpoints_dir(folder).glob(".step_*")), where
    assert {10, 20} <= set(landed)


# --- one process ----------------------------------------------------------------------------------------------


def _whole(value: float, score: float | None = None) -> Contents:
    states = {state: torch.full((15,), value) for state in (MASTER, *MOMENTS)}
    fragment = Fragment("weight", 15, 0, states, True, states[MASTER])
    return Contents([fragment], {"weight": [5, 3]}, [], {"counters": {}}, score=score)


def _saved(saver: Saver, step: int, value: float, score: float | None = None) -> Outcome:
    saver.begin(step, _whole(value, score))
    saver._join(hurry=False)
    (outcome,) = saver.poll()
    return outcome


def _fails(saver: Saver, step: int, told: str) -> None:
    outcome = _saved(saver, step, 9.0)
    assert told in outcome.error
    assert step not in list_steps(saver.run_dir)


def test_a_full_disk_and_a_folder_that_cannot_be_written_leave_the_older_checkpoint(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, alone)
    assert _saved(saver, 10, 1.0).error == ""
    for number, told in ((errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")):

        def refuse(*args: object, number: int = number, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        for place in ("fsync", "rename"):
            with monkeypatch.context() as patch:
                patch.setattr(os, place, refuse) if place == "fsync" else patch.setattr(Path, place, refuse)
                _fails(saver, 20, told)
            assert not list(checkpoints_dir(tmp_path).glob(".step_*")), "rests fill the disk further"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            _fails(saver, 20, told)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        saver.begin(20, _whole(9.0), needed_bytes=101)
        (outcome,) = saver.finish()
        assert "are free" in outcome.error
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 10)
    assert _saved(saver, 30, 3.0).error == ""
    saver.close()
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 30)


def test_a_really_full_file_system_is_survived(alone: distributed.RankInfo, tmp_path: Path) -> None:
    """The same without stand-ins, on a file system of 1 MiB."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        saver = Saver(small, alone)
        assert _saved(saver, 10, 1.0).error == ""
        states = {state: torch.ones(200_000) for state in (MASTER, *MOMENTS)}
        big = Contents([Fragment("w", 200_000, 0, states, True, states[MASTER])], {"w": [200_000]}, [], {})
        saver.begin(20, big)
        (outcome,) = saver.finish()
        assert "No space left" in outcome.error
        assert _saved(saver, 30, 3.0).error == "", "the rests of the failed save still fill the disk"
        saver.close()
        assert newest_valid(small) == checkpoint_path(small, 30)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_changes_after_the_copy_does_not_reach_the_checkpoint(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, slow = mvit.checkpoint_save.write_shard, 0.3

    def write(*args: Any) -> dict[str, Any]:
        time.sleep(slow)
        return real(*args)

    monkeypatch.setattr(mvit.checkpoint_save, "write_shard", write)
    saver, contents = Saver(tmp_path, alone, Retention(keep_last=3)), _whole(1.0)
    began = time.perf_counter()
    saver.begin(10, contents)
    assert time.perf_counter() - began < slow, "training waited for the write"
    assert saver.poll() == []
    for values in contents.fragments[0].states.values():
        values.fill_(7.0)
    saver.begin(20, contents)  # waits for the first: none overtakes another
    assert list_steps(tmp_path) == [10]
    outcomes = [*saver.poll(), *saver.finish()]
    assert [outcome.step for outcome in outcomes] == [10, 20]
    assert outcomes[1].stalled_s > slow / 2 > outcomes[0].stalled_s
    for step, value in ((10, 1.0), (20, 7.0)):
        assert all(tensor.eq(value).all() for _, tensor in whole_weights(checkpoint_path(tmp_path, step)))
    saver.close()


def test_without_a_thread_a_save_is_finished_when_it_returns(alone: distributed.RankInfo, tmp_path: Path) -> None:
    saver = Saver(tmp_path, alone, asynchronous=False)
    saver.begin(10, _whole(1.0))
    assert list_steps(tmp_path) == [10]
    assert [outcome.error for outcome in saver.poll()] == [""]
    saver.close()


def test_a_checkpoint_that_reads_back_damaged_is_reported_and_nothing_older_goes(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=1))
    _saved(saver, 10, 1.0)

    def spoil(name: str) -> None:
        if name == "listed":  # published: from here on the medium goes wrong
            file = checkpoint_path(tmp_path, 20) / "rank_00000.safetensors"
            data = bytearray(file.read_bytes())
            data[-3] ^= 4
            file.write_bytes(data)

    monkeypatch.setattr(mvit.checkpoint_files, "at_point", spoil)
    outcome = _saved(saver, 20, 2.0)
    assert outcome.error == ""
    assert "differs from what was written" in outcome.damage[0]
    assert "the checkpoint of step 20 is damaged on disk" in caplog.text
    assert list_steps(tmp_path) == [10, 20]
    assert [line["read_back"] for line in publications(tmp_path)] == [True, False]
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 10)
    monkeypatch.undo()
    _saved(saver, 30, 3.0)
    assert list_steps(tmp_path) == [30]
    saver.close()


def test_a_checkpoint_that_nobody_read_back_does_not_replace_the_last_older_one(
    alone: distributed.RankInfo, tmp_path: Path
) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=1))
    _saved(saver, 10, 1.0)
    saver.begin(20, _whole(2.0), read_back=False)  # as at a stop
    saver.finish()
    assert list_steps(tmp_path) == [10, 20]
    _saved(saver, 30, 3.0)
    saver.close()
    assert list_steps(tmp_path) == [30]


def test_two_lives_that_save_at_once_never_mix(alone: distributed.RankInfo, tmp_path: Path) -> None:
    """An orphan of a lost node and the job's next life write the same steps; each checkpoint is of one of them."""
    lives = [Saver(tmp_path, alone, Retention(keep_last=2)) for _ in range(2)]
    outcomes: list[Outcome] = []
    for step in range(1, 16):
        for value, life in enumerate(lives):
            life.begin(step, _whole(100.0 * step + value))
            outcomes += life.poll()
    for life in lives:
        outcomes += life.finish()
        life.close()
    assert len(outcomes) == 30
    assert sum(not outcome.error for outcome in outcomes) >= 15
    for step in list_steps(tmp_path):
        path = checkpoint_path(tmp_path, step)
        assert verify(path) == []
        values = {float(v) for _, tensor in whole_weights(path) for v in tensor.flatten()}
        assert values in ({100.0 * step}, {100.0 * step + 1}), "two lives' files in one checkpoint"
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 15)


def test_damage_of_every_kind_is_found_and_passed_over(alone: distributed.RankInfo, tmp_path: Path) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=10))
    _saved(saver, 1, 1.0)
    shard = "rank_00000.safetensors"
    damages: dict[str, Callable[[Path], object]] = {
        "truncated shard": lambda path: os.truncate(path / shard, 100),
        "empty shard": lambda path: os.truncate(path / shard, 0),
        "missing shard": lambda path: (path / shard).unlink(),
        "flipped bit": lambda path: _flip(path / shard, -7),
        "flipped bit in the header": lambda path: _flip(path / shard, 20),
        "truncated manifest": lambda path: os.truncate(path / "manifest.json", 50),
        "missing manifest": lambda path: (path / "manifest.json").unlink(),
        "flipped bit in the manifest": lambda path: _flip(path / "manifest.json", 90),
        "shard of another step": lambda path: (path / shard).write_bytes(
            (checkpoint_path(tmp_path, 1) / shard).read_bytes()
        ),
    }
    for step, (kind, damage) in enumerate(damages.items(), start=2):
        _saved(saver, step, float(step))
        damage(checkpoint_path(tmp_path, step))
        assert verify(checkpoint_path(tmp_path, step)), kind
        assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 1), kind
    saver.close()
    _flip(checkpoint_path(tmp_path, 1) / shard, -1)
    with pytest.raises(CheckpointError, match="none is usable"):
        newest_valid(tmp_path)


def _flip(file: Path, index: int) -> None:
    data = bytearray(file.read_bytes())
    data[index] ^= 1
    file.write_bytes(data)


def test_a_manifest_that_leaves_the_folder_is_not_followed(alone: distributed.RankInfo, tmp_path: Path) -> None:
    """File names come from the manifest: one that leads elsewhere is damage, not a path to read."""
    saver = Saver(tmp_path, alone)
    _saved(saver, 1, 1.0)
    saver.close()
    file = checkpoint_path(tmp_path, 1) / "manifest.json"
    raw = json.loads(file.read_text())
    del raw["sha256"]
    raw["files"][0]["file"] = "../step_00000002/rank_00000.safetensors"
    file.write_text(mvit.checkpoint.seal(raw))
    with pytest.raises(CheckpointError, match=r"file name '\.\./step"):
        read_manifest(file.parent)


def test_the_newest_the_multiples_and_the_best_are_kept(alone: distributed.RankInfo, tmp_path: Path) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=1, keep_every=40, keep_best=2))
    scores = {10: 0.5, 20: 0.9, 30: None, 40: 0.7, 50: 0.9, 60: 0.1, 70: None, 80: 0.2, 90: 0.3}
    for step, score in scores.items():
        _saved(saver, step, 1.0, score)
    saver.close()
    assert list_steps(tmp_path) == [20, 40, 50, 80, 90]
