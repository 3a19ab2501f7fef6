"""Measure the training pipeline's speed per CPU-second, beside the usual PIL and torchvision one on the same shards."""

import io
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from PIL import Image
from torchvision import transforms

from data_pipeline.decode import class_label, picture
from data_pipeline.image import ImageConfig, ImageTransform, collate_images, rand_augment
from data_pipeline.loader import DataConfig, TrainLoader
from data_pipeline.reads import Collate, Item, Transform
from data_pipeline.seeding import seeded
from data_pipeline.shards import ShardSet

Pipeline = tuple[Transform, Collate]


@dataclass(frozen=True)
class DataBenchRow:
    """One pipeline with one number of workers; medians over the rounds."""

    pipeline: str
    workers: int
    samples_per_cpu_second: float
    """Of all processes together: what a core of the machine is worth."""
    samples_per_second: float
    """Wall clock: suffers from whatever else the machine does."""
    ratio: float
    """samples_per_cpu_second over that of the first pipeline, torchvision's, with as many workers."""


class TorchvisionTransform:
    """The usual pipeline of torchvision and timm: PIL, bicubic crop, flip, RandAugment, float32, normalised."""

    def __init__(self, config: ImageConfig) -> None:
        mode = transforms.InterpolationMode(config.interpolation)
        self._image_size = config.image_size
        self._crop = transforms.RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio, mode)
        self._flip = transforms.RandomHorizontalFlip(config.hflip_prob)
        self._augment = rand_augment(config.model_copy(update={"decoder": "pil"}))
        self._finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[torch.Tensor, int]:
        with seeded(seed, torch.device("cpu")):
            image = self._flip(self._crop(Image.open(io.BytesIO(picture(members))).convert("RGB")))
        if self._augment is not None:
            image = Image.fromarray(self._augment(np.asarray(image), seed))
        pixels: Any = self._finish(image)
        return pixels, class_label(members)

    def padding(self) -> tuple[torch.Tensor, int]:
        """Return the example that fills up an evaluation batch."""
        return torch.zeros(3, *self._image_size), 0


class UndecodedTransform:
    """Read the members and do nothing: the speed of the shards alone."""

    def __call__(self, members: dict[str, bytes], seed: int) -> int:
        del seed
        return class_label(members)

    def padding(self) -> int:
        """Return a label."""
        return 0


def image_pipelines(config: ImageConfig) -> dict[str, Pipeline]:
    """Return the pipelines by name, the one that all others are compared with first."""
    return {
        "torchvision, PIL, float32": (TorchvisionTransform(config), _stack),
        f"ours, {config.decoder}, uint8": (ImageTransform(config, train=True), collate_images),
        "ours, reading only": (UndecodedTransform(), _labels),
    }


def bench_data(
    shards: ShardSet,
    pipelines: Mapping[str, Pipeline],
    workers: Sequence[int] = (0,),
    *,
    batch_size: int = 50,
    num_batches: int = 10,
    rounds: int = 3,
) -> list[DataBenchRow]:
    """Run the pipelines in turn, `rounds` times each, over `num_batches` batches of `batch_size`; return medians.

    All pipelines read through the same index (reading is a few per cent of the work and has its own row). CPU time
    covers this process and the workers. One thread per process.
    """
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    try:
        for number in range(rounds):
            for count in workers:
                for name, (transform, collate) in pipelines.items():
                    rate = _measure(shards, transform, collate, count, batch_size, num_batches, seed=number)
                    rates.setdefault((name, count), []).append(rate)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    medians = {
        key: tuple(statistics.median(values) for values in zip(*found, strict=True)) for key, found in rates.items()
    }
    usual = next(iter(pipelines))
    return [
        DataBenchRow(name, count, by_cpu, by_clock, by_cpu / medians[usual, count][0])
        for (name, count), (by_cpu, by_clock) in medians.items()
    ]


def _measure(
    shards: ShardSet, transform: Transform, collate: Collate, workers: int, batch_size: int, num_batches: int, seed: int
) -> tuple[float, float]:
    """Return (samples per CPU-second, samples per second) of a warm loader, drained as fast as it gives."""
    loader = TrainLoader(
        shards,
        transform,
        collate,
        DataConfig(num_workers=workers, pin_memory=False),
        seed=seed,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
    )
    stream = loader.start()
    # What is measured only takes batches, so the queues are as good as empty at both ends of the measurement.
    for _ in islice(stream, 1 + 2 * workers):
        pass
    cpu, clock = _cpu_seconds(), time.perf_counter()
    for _ in islice(stream, num_batches):
        pass
    cpu, clock = _cpu_seconds() - cpu, time.perf_counter() - clock
    loader.close()
    samples = batch_size * num_batches
    return samples / max(cpu, 1e-9), samples / clock


def _cpu_seconds() -> float:
    """Return the CPU time of this process and all living descendants (workers are children of the fork server)."""
    workers = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in workers)


def _stack(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([item.example[0] for item in items]), torch.tensor([item.example[1] for item in items])


def _labels(items: Sequence[Item]) -> np.ndarray:
    return np.array([item.example for item in items])
