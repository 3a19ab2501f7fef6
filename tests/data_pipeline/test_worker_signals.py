"""Decoding workers outlive every signal that a job may send them, and no training process that wants them gone."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.image import ImageConfig, ImageTransform, collate_images
from data_pipeline.loader import DataConfig, TrainLoader
from data_pipeline.shards import open_shards
from tests.data_pipeline.pictures import photo_samples, write_shards

SECONDS = 15.0  # a worker looks every two


class _Stuck:
    """A transform that never ends, as on a file system that does not answer."""

    def __call__(self, members: Any, seed: int) -> Any:
        time.sleep(600)


def _loader(folder: Path, transform: Any) -> TrainLoader:
    return TrainLoader(
        open_shards(write_shards(folder, photo_samples(12), 6)),
        transform,
        collate_images,
        DataConfig(num_workers=2, prefetch=1, shuffle_window=2, pin_memory=False),
        seed=5,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
    )


def _images() -> ImageTransform:
    return ImageTransform(ImageConfig(image_size=(16, 16)), train=True)


def _workers() -> list[psutil.Process]:
    """Return the processes of running loaders: the children of the fork server."""
    return [process for child in psutil.Process().children() for process in child.children()]


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "HUP"])
def test_a_signal_to_every_process_of_the_job_ends_no_worker(tmp_path: Path, name: str) -> None:
    loader = _loader(tmp_path, _images())
    stream = loader.start()
    next(stream)
    before = _workers()
    assert len(before) == 2
    helpers = psutil.Process().children(recursive=True)
    subprocess.run(["kill", f"-{name}", *(str(process.pid) for process in helpers)], check=True)  # somebody else does
    assert len(list(islice(stream, 12))) == 12
    assert _workers() == before
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 3
    assert not any(process.is_running() for process in before)
    with_new_workers = loader.start(3)
    assert next(with_new_workers).images.shape == (4, 3, 16, 16)
    assert all(helper.is_running() for helper in helpers if helper not in before), "the fork server is the same"
    loader.close()


def test_a_worker_that_is_stuck_is_ended_by_its_own_training_process(tmp_path: Path) -> None:
    loader = _loader(tmp_path, _Stuck())
    stream = loader.start()
    deadline = time.monotonic() + 30
    while len(workers := _workers()) < 2 or any(worker.num_threads() < 2 for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    loader.close()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert time.monotonic() - began < 2 * 5 + 5, "torch waits 5 s for each"
    del stream


def train_for_ever(folder: str) -> None:
    stream = _loader(Path(folder), _images()).start()
    next(stream)
    print("workers", *(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    while True:
        next(stream)
        time.sleep(0.1)


def test_workers_and_fork_server_leave_when_the_training_process_is_killed(tmp_path: Path) -> None:
    script = (
        f"from {__name__} import train_for_ever\nif __name__ == '__main__':\n    train_for_ever({str(tmp_path)!r})\n"
    )
    (tmp_path / "train.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = next(line for line in process.stdout if line.startswith("workers"))
    helpers = [psutil.Process(int(pid)) for pid in told.split()[1:]]
    assert len(helpers) >= 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=SECONDS)
    for helper in alive:
        helper.kill()
    assert not alive
