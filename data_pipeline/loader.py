"""Order → shards → decode → transform → batches, for training (endless, resumable) and evaluation (exactly once).

Workers are stateless: the parent tells them which sample ids to read, so the whole state of the stream is the number of
global steps done, and neither the number of workers nor their prefetching can change what a step sees.
"""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from data_pipeline.ahead import FetchAhead, evaluation_needs, training_needs
from data_pipeline.download import FetchCounts
from data_pipeline.helper_signals import signals_held
from data_pipeline.order import Stream, chunk_positions
from data_pipeline.reads import (
    BadSamples,
    Collate,
    CollateWithBad,
    EvaluationReads,
    Loaded,
    TrainingReads,
    Transform,
)
from data_pipeline.remote import STREAMS
from data_pipeline.settings import Settings
from data_pipeline.shards import ShardSet
from data_pipeline.workers import preload_workers, start_worker

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 60.0


class DataConfig(Settings):
    """Where the samples come from and how they are read."""

    train: str | list[str] | None = None
    """Training shards: a packed folder, a brace or glob pattern, a URL, or a list of them."""
    validation: str | list[str] | None = None
    """Evaluation shards, given like `train`."""
    cache_dir: Path | None = None
    """Node-local folder for copies of remote shards and for indexes of shards in read-only folders."""
    cache_gib: float | None = Field(default=None, gt=0)
    """Most that the copies there take together (GiB); None: what the disk has, but for 5 %."""
    num_workers: int = Field(default=8, ge=0)
    """Decoding processes per rank (8 a GPU in the published training); 0 decodes in the training process."""
    prefetch: int = Field(default=4, ge=1)
    """Batches each worker prepares ahead."""
    shuffle_window: int = Field(default=32, ge=1)
    """Shards whose samples are shuffled together: the shuffle pool, and the most shards read at a time."""
    max_bad_samples: int = Field(default=0, ge=0)
    """Undecodable samples a rank may replace (training) or leave out (evaluation) in one attempt before it stops."""
    pin_memory: bool = True
    """Page-locked host batches, so that copies to a GPU overlap with computing; ignored without a GPU."""


def _make_loader(
    reads: Dataset, batches: Any, collate: Collate, config: DataConfig, persistent_workers: bool
) -> DataLoader:
    """Build torch's DataLoader; `batches` is an iterable of index lists (endless for training)."""
    workers = config.num_workers > 0
    if workers:
        preload_workers()
    return DataLoader(
        reads,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=CollateWithBad(collate),
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker if workers else None,
        # fork would copy CUDA, NCCL and signal handlers into the workers; spawn would import torch in each of them.
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=config.prefetch if workers else None,
        persistent_workers=persistent_workers and workers,
        generator=torch.Generator(),  # otherwise starting a loader draws from the global generator
    )


class _ChunkSampler:
    """Endless lists of (position, epoch, sample id): this rank's chunks from global step `first_step` on."""

    def __init__(self, loader: "TrainLoader", first_step: int) -> None:
        self.loader, self.first_step = loader, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        ours = self.loader
        for step in count(self.first_step):
            for accumulation_index in range(ours.accumulation_steps):
                positions = chunk_positions(
                    step,
                    accumulation_index,
                    ours.rank,
                    ours.world_size,
                    ours.micro_batch_size,
                    ours.accumulation_steps,
                )
                yield [(position, *ours.stream.locate(position)) for position in positions]


class TrainLoader:
    """The endless training stream of one rank; each sample comes `repeats` times running, augmented anew.

    Raises ValueError if the shards are empty, or `global_batch_size` is not a multiple of
    micro_batch_size * world_size.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        collate: Collate,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        repeats: int = 1,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"world_size {world_size} = {micro_batch_size * world_size}; change one of the three."
            )
        self.shards, self.config, self.seed = shards, config, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.accumulation_steps = global_batch_size // (micro_batch_size * world_size)
        self.rank, self.world_size = rank, world_size
        self.stream = Stream(shards.shard_sizes, seed, config.shuffle_window, repeats)
        shards.check_cache(config.shuffle_window)
        self.fetched = FetchCounts()
        """What remote shards have cost this rank and its workers so far."""
        self._ahead: FetchAhead | None = None
        self._reads = TrainingReads(shards, transform, self.stream)
        self._collate = collate
        self._bad = BadSamples(config.max_bad_samples)
        self._running: Generator[Any, None, None] | None = None

    @property
    def num_bad(self) -> int:
        """Distinct undecodable samples this rank has replaced so far."""
        return len(self._bad.seen)

    def remote_figures(self) -> dict[str, float]:
        """Return what remote shards have cost this rank so far, for the log; nothing if none is remote."""
        if not any(self.shards.remote):
            return {}
        ours = self.fetched
        return {"fetched_gib": ours.num_bytes / 2**30, "fetch_retries": ours.retries, "fetch_wait_s": ours.wait_s}

    def start(self, step: int = 0) -> Iterator[Any]:
        """Return this rank's endless batches; the first is accumulation 0 of global step `step` (0, 1, …).

        Stops the workers of an earlier `start`. Iterating raises BadSampleError beyond `data.max_bad_samples`.
        """
        self.close()
        loader = _make_loader(self._reads, _ChunkSampler(self, step), self._collate, self.config, False)
        if any(self.shards.remote):
            needs = training_needs(self.shards, self.stream, step * self.global_batch_size)
            self._ahead = FetchAhead(
                self.shards, needs, self.shards.ahead_bytes(), max(3 * self.config.shuffle_window, 4 * STREAMS)
            )
        with signals_held():
            iterator = iter(loader)
        self._running = self._batches(iterator, step)
        next(self._running)  # runs up to the bare yield: from here on `close` reaches the workers
        return self._running

    def _batches(self, iterator: Iterator[Loaded], step: int) -> Generator[Any, None, None]:
        yield None
        told, shown = time.monotonic(), str(self.fetched)
        for number, loaded in enumerate(iterator):
            self._bad.add(loaded.bad)
            if self._ahead is not None and self.shards.cache is not None:
                self._ahead.advance((step + number // self.accumulation_steps) * self.global_batch_size)
                self.fetched.add(loaded.fetched)
                self.fetched.add(self.shards.cache.take_counts())  # those of the threads that fetch ahead
                if time.monotonic() - told > _TELL_EVERY_S and str(self.fetched) != shown:
                    told, shown = time.monotonic(), str(self.fetched)
                    logger.info("Remote shards, this rank so far: %s", shown)
            yield loaded.batch

    def close(self) -> None:
        """Stop the workers of the running stream, if any."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._running is not None:
            self._running.close()
            self._running = None

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what identifies the stream after `step` finished steps: a few numbers, the same on every rank."""
        return {
            "step": step,
            "samples_seen": step * self.global_batch_size,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle_window": self.config.shuffle_window,
            "num_samples": self.stream.num_samples,
            "repeats": self.stream.repeats,
            "fingerprint": self.shards.fingerprint(),
        }

    def check_state(self, state: Mapping[str, int | str]) -> None:
        """Raise ValueError unless `start(state["step"])` continues exactly the stream `state` was taken from."""
        state = {"repeats": 1, **state}  # not saved before there were any
        ours = self.state_dict(int(state.get("step", 0)))
        differing = [
            f"{name} was {state.get(name, 'not saved')}, is {ours[name]}"
            for name in ours
            if state.get(name) != ours[name]
        ]
        if differing:
            raise ValueError(
                "The saved data cursor belongs to another stream: "
                + "; ".join(differing)
                + ". Resume with the data and "
                "settings of the run, or start a new run from its weights."
            )


class EvaluationLoader:
    """Every sample exactly once over all ranks, in order, in equally many full batches on every rank.

    Batch b of rank r holds samples [(b·world_size + r)·batch_size, …); what is missing at the end is padding
    with weight 0 and id -1. An undecodable sample becomes padding too, is counted in `num_bad`, and raises
    beyond `data.max_bad_samples`; summed over ranks, weights + num_bad is the size of the set.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        collate: Collate,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if len(shards) == 0:
            raise ValueError("The validation shards hold no sample; there is nothing to evaluate.")
        self.shards, self.config, self.batch_size = shards, config, batch_size
        self.rank, self.world_size = rank, world_size
        self._reads = EvaluationReads(shards, transform)
        self._collate = collate
        self._bad = BadSamples(config.max_bad_samples)
        self._loader: DataLoader | None = None
        self.fetched = FetchCounts()
        """What remote shards have cost this rank and its workers so far."""

    def __len__(self) -> int:
        return -(-len(self.shards) // (self.batch_size * self.world_size))

    @property
    def num_bad(self) -> int:
        """Distinct undecodable samples this rank has left out so far."""
        return len(self._bad.seen)

    def _id_lists(self) -> list[list[int]]:
        size, total = self.batch_size, len(self.shards)
        firsts = [(b * self.world_size + self.rank) * size for b in range(len(self))]
        return [[i if i < total else -1 for i in range(first, first + size)] for first in firsts]

    def __iter__(self) -> Iterator[Any]:
        if self._loader is None:
            self._loader = _make_loader(self._reads, self._id_lists(), self._collate, self.config, True)
        ahead = None
        if any(self.shards.remote):
            spare = self.shards.spare_bytes()
            ahead = FetchAhead(self.shards, evaluation_needs(self.shards), spare, 4 * STREAMS)
        try:
            with signals_held():
                iterator = iter(self._loader)
            for number, loaded in enumerate(iterator):
                self._bad.add(loaded.bad)
                if ahead is not None and self.shards.cache is not None:
                    ahead.advance(number * self.batch_size * self.world_size)
                    self.fetched.add(loaded.fetched)
                    self.fetched.add(self.shards.cache.take_counts())
                yield loaded.batch
        finally:
            if ahead is not None:
                ahead.close()

    def close(self) -> None:
        """Stop the workers, which otherwise stay for the next evaluation."""
        self._loader = None
