"""Measure pipelines of training samples per CPU-second, side by side on the same shards, and what a device waits."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import cv2
import psutil
import torch

from data_pipeline.loader import DataConfig, TrainLoader
from data_pipeline.reads import Collate, Transform
from data_pipeline.shards import ShardSet


class Reading(NamedTuple):
    """What a pipeline is asked for."""

    shards: ShardSet
    workers: int
    batch_size: int
    seed: int


Opens = Callable[[Reading], AbstractContextManager[Iterator[Any]]]
"""Starts a pipeline: endless batches, and its processes gone at the end."""


@dataclass(frozen=True)
class Contender:
    """A pipeline under its name; ours are compared with the peers of the same `augmentation` and all references."""

    name: str
    opens: Opens
    role: Literal["ours", "peer", "reference", "other"] = "ours"
    augmentation: str | None = None


@dataclass(frozen=True)
class DataBenchRow:
    """One pipeline with one number of workers; medians over the rounds."""

    pipeline: str
    augmentation: str | None
    workers: int
    samples_per_cpu_second: float
    """Of all processes together: what a core of the machine is worth."""
    samples_per_second: float
    """Wall clock: suffers from whatever else the machine does."""
    ratios: dict[str, float]
    """Ours only: samples_per_cpu_second over that of each peer and reference with as many workers."""


@dataclass(frozen=True)
class FeedRow:
    """How long a device that takes `samples_per_second` waits for its data."""

    workers: int
    samples_per_second: float
    wait_share: float
    """Part of the time; 0 is a device that never waits."""


def through_loader(transform: Transform, collate: Collate) -> Opens:
    """Return what reads, transforms and collates as training does."""

    @contextmanager
    def opened(reading: Reading) -> Iterator[Iterator[Any]]:
        loader = TrainLoader(
            reading.shards,
            transform,
            collate,
            DataConfig(num_workers=reading.workers, pin_memory=False),
            seed=reading.seed,
            global_batch_size=reading.batch_size,
            micro_batch_size=reading.batch_size,
            rank=0,
            world_size=1,
        )
        try:
            yield loader.start()
        finally:
            loader.close()

    return opened


def bench_data(
    shards: ShardSet,
    contenders: Sequence[Contender],
    workers: Sequence[int] = (0,),
    *,
    batch_size: int = 50,
    num_batches: int = 10,
    rounds: int = 3,
) -> list[DataBenchRow]:
    """Run the contenders in turn, `rounds` times each, over `num_batches` batches of `batch_size`; return medians.

    CPU time covers this process and the workers. One thread per process.
    """
    rates: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with _one_thread():
        for seed in range(rounds):
            for count in workers:
                for place, contender in enumerate(contenders):
                    rate = _measure(contender.opens, Reading(shards, count, batch_size, seed), num_batches)
                    rates.setdefault((place, count), []).append(rate)
    medians = {key: [statistics.median(each) for each in zip(*found, strict=True)] for key, found in rates.items()}
    rows = []
    for (place, count), (by_cpu, by_clock) in medians.items():
        ours = contenders[place]
        ratios = {
            other.name: by_cpu / medians[at, count][0]
            for at, other in enumerate(contenders)
            if ours.role == "ours"
            and (other.role == "reference" or (other.role == "peer" and other.augmentation == ours.augmentation))
        }
        rows.append(DataBenchRow(ours.name, ours.augmentation, count, by_cpu, by_clock, ratios))
    return rows


def bench_feed(
    shards: ShardSet,
    contender: Contender,
    workers: Sequence[int],
    samples_per_second: float,
    *,
    batch_size: int = 50,
    num_batches: int = 40,
) -> list[FeedRow]:
    """Take batches as a device does that computes for batch_size / samples_per_second s; return its waiting.

    Batches that were prepared before the measurement are taken first, so that they cannot hide a want of workers.
    """
    rows = []
    compute_s = batch_size / samples_per_second
    with _one_thread():
        for count in workers:
            with contender.opens(Reading(shards, count, batch_size, 0)) as stream:
                waited = total = 0.0
                prepared = 2 + 2 * DataConfig().prefetch * count
                for number in range(prepared + num_batches):
                    start = time.perf_counter()
                    next(stream)
                    got = time.perf_counter()
                    time.sleep(compute_s)
                    if number >= prepared:
                        waited, total = waited + got - start, total + time.perf_counter() - start
            rows.append(FeedRow(count, samples_per_second, waited / total))
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _measure(opens: Opens, reading: Reading, num_batches: int) -> tuple[float, float]:
    """Return (samples per CPU-second, samples per second) of a warm pipeline, drained as fast as it gives."""
    with opens(reading) as stream:
        # What is measured only takes batches, so the queues are as good as empty at both ends of the measurement.
        for _ in islice(stream, 1 + 2 * reading.workers):
            pass
        cpu, clock = _cpu_seconds(), time.perf_counter()
        for _ in islice(stream, num_batches):
            pass
        cpu, clock = _cpu_seconds() - cpu, time.perf_counter() - clock
    samples = reading.batch_size * num_batches
    return samples / max(cpu, 1e-9), samples / clock


def _cpu_seconds() -> float:
    """Return the CPU time of this process and all living descendants (workers are children of the fork server)."""
    workers = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in workers)
