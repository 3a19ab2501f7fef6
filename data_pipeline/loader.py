"""Order → shards → decode → transform → batches, for training (endless, resumable) and evaluation (exactly once).

Workers are stateless: the parent tells them which sample ids to read, so the whole state of the stream is the number of
global steps done, and neither the number of workers nor their prefetching can change what a step sees.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import ImageBatch
from data_pipeline.decode import DecodeError
from data_pipeline.order import Stream, chunk_positions, derive_seed
from data_pipeline.settings import Settings
from data_pipeline.shards import ShardSet
from data_pipeline.workers import preload_workers, signals_held, start_worker

logger = logging.getLogger(__name__)


class DataConfig(Settings):
    """Where the samples come from and how they are read."""

    train: str | list[str] | None = None
    """Training shards: a packed folder, a brace or glob pattern, a URL, or a list of them."""
    validation: str | list[str] | None = None
    """Evaluation shards, given like `train`."""
    cache_dir: Path | None = None
    """Node-local folder for copies of remote shards and for indexes of shards in read-only folders."""
    num_workers: int = Field(default=8, ge=0)
    """Decoding processes per rank (8 a GPU in the published training); 0 decodes in the training process."""
    prefetch: int = Field(default=4, ge=1)
    """Batches each worker prepares ahead."""
    shuffle_window: int = Field(default=32, ge=1)
    """Shards whose samples are shuffled together: the shuffle pool, and the most shards read at a time."""
    max_bad_samples: int = Field(default=0, ge=0)
    """Undecodable samples a rank may replace (training) or leave out (evaluation) before it stops."""
    pin_memory: bool = True
    """Page-locked host batches, so that copies to a GPU overlap with computing; ignored without a GPU."""


class BadSample(NamedTuple):
    """An undecodable sample met while reading."""

    sample_id: int
    key: str
    reason: str


class BadSampleError(ValueError):
    """More undecodable samples than `data.max_bad_samples` allows."""


class Item(NamedTuple):
    """One transformed example on its way into a batch; padding has sample_id -1 and weight 0."""

    example: Any
    sample_id: int
    key: str
    weight: float


class Loaded(NamedTuple):
    """What a worker hands over: a batch, and the undecodable samples met while making it."""

    batch: Any
    bad: tuple[BadSample, ...]


class Transform(Protocol):
    """A picklable, pure function from a sample's members and a seed to one example; DecodeError marks a bad sample."""

    def __call__(self, members: dict[str, bytes], seed: int) -> Any: ...

    def padding(self) -> Any:
        """Return an example of the right shape that stands for no sample."""
        ...


Collate = Callable[[Sequence[Item]], Any]


class _TrainingReads(Dataset):
    """Reads the samples of one chunk; replaces undecodable ones by the next readable sample of the epoch's order."""

    def __init__(self, shards: ShardSet, transform: Transform, stream: Stream, seed: int) -> None:
        self.shards, self.transform, self.stream, self.seed = shards, transform, stream, seed

    def __getitems__(self, draws: list[tuple[int, int, int]]) -> tuple[list[Item], list[BadSample]]:
        bad: list[BadSample] = []
        return [self._read(*draw, bad) for draw in draws], bad

    def _read(self, position: int, epoch: int, sample_id: int, bad: list[BadSample]) -> Item:
        chosen, seed = sample_id, derive_seed(self.seed, epoch, sample_id)
        for tries in range(1, self.stream.num_samples + 1):
            try:
                return Item(self.transform(self.shards.read(chosen), seed), chosen, self.shards.key(chosen), 1.0)
            except DecodeError as error:
                bad.append(BadSample(chosen, self.shards.key(chosen), str(error)))
            # The replacement keeps the bad sample's seed: elsewhere in the epoch it is augmented with its own.
            place = (position + tries) % self.stream.num_samples
            chosen = int(self.stream.order(epoch)[place])
        raise BadSampleError(f"None of the {self.stream.num_samples} training samples can be decoded; last: {bad[-1]}.")


class _EvaluationReads(Dataset):
    """Reads samples in order; padding (-1) and undecodable samples become examples of weight 0."""

    def __init__(self, shards: ShardSet, transform: Transform) -> None:
        self.shards, self.transform = shards, transform

    def __getitems__(self, ids: list[int]) -> tuple[list[Item], list[BadSample]]:
        bad: list[BadSample] = []
        return [self._read(sample_id, bad) for sample_id in ids], bad

    def _read(self, sample_id: int, bad: list[BadSample]) -> Item:
        if sample_id >= 0:
            try:
                example = self.transform(self.shards.read(sample_id), 0)
                return Item(example, sample_id, self.shards.key(sample_id), 1.0)
            except DecodeError as error:
                bad.append(BadSample(sample_id, self.shards.key(sample_id), str(error)))
        return Item(self.transform.padding(), -1, "padding", 0.0)


class _CollateWithBad:
    """Picklable collate of (items, bad samples) into `Loaded`."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, read: tuple[list[Item], list[BadSample]]) -> Loaded:
        items, bad = read
        return Loaded(self.collate(items), tuple(bad))


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
        collate_fn=_CollateWithBad(collate),
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker if workers else None,
        # fork would copy CUDA, NCCL and signal handlers into the workers; spawn would import torch in each of them.
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=config.prefetch if workers else None,
        persistent_workers=persistent_workers and workers,
        generator=torch.Generator(),  # otherwise starting a loader draws from the global generator
    )


class _BadSamples:
    """Counts distinct undecodable samples of this rank, logs each once, and stops beyond the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: dict[int, BadSample] = {}

    def add(self, bad: Sequence[BadSample]) -> None:
        for sample in bad:
            if sample.sample_id in self.seen:
                continue
            self.seen[sample.sample_id] = sample
            logger.warning("Undecodable sample %s: %s", sample.key, sample.reason)
            if len(self.seen) > self.limit:
                raise BadSampleError(
                    f"{len(self.seen)} undecodable sample(s) on this rank, data.max_bad_samples allows {self.limit}: "
                    f"{sample.key}: {sample.reason}. Run `mvit data check` on the shards and pack them again without "
                    f"it, or raise data.max_bad_samples to go on without such samples."
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
                    step, accumulation_index, ours.rank, ours.world_size, ours.micro_batch_size, ours.accumulation_steps
                )
                yield [(position, *ours.stream.locate(position)) for position in positions]


class TrainLoader:
    """The endless training stream of one rank.

    Raises ValueError when the shards are empty or `global_batch_size` is not a multiple of micro_batch_size * world_size.
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
        self.stream = Stream(shards.shard_sizes, seed, config.shuffle_window)
        self._reads = _TrainingReads(shards, transform, self.stream, seed)
        self._collate = collate
        self._bad = _BadSamples(config.max_bad_samples)
        self._running: Generator[ImageBatch, None, None] | None = None

    @property
    def num_bad(self) -> int:
        """Distinct undecodable samples this rank has replaced so far."""
        return len(self._bad.seen)

    def start(self, step: int = 0) -> Iterator[ImageBatch]:
        """Return the endless batches of this rank; the first is accumulation 0 of global step `step` (0 = the first step).

        Stops the workers of an earlier `start`. Iterating raises BadSampleError beyond `data.max_bad_samples`.
        """
        self.close()
        loader = _make_loader(self._reads, _ChunkSampler(self, step), self._collate, self.config, False)
        with signals_held():
            iterator = iter(loader)
        self._running = self._batches(iterator)
        next(self._running)  # runs up to the bare yield: from here on `close` reaches the workers
        return self._running

    def _batches(self, iterator: Iterator[Loaded]) -> Generator[Any, None, None]:
        yield None
        for loaded in iterator:
            self._bad.add(loaded.bad)
            yield loaded.batch

    def close(self) -> None:
        """Stop the workers of the running stream, if any."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what identifies the stream after `step` finished global steps: a few numbers, the same on every rank."""
        return {
            "step": step,
            "samples_seen": step * self.global_batch_size,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle_window": self.config.shuffle_window,
            "num_samples": self.stream.num_samples,
            "fingerprint": self.shards.fingerprint(),
        }

    def check_state(self, state: Mapping[str, int | str]) -> None:
        """Raise ValueError unless `start(state["step"])` would continue exactly the stream that `state` was taken from."""
        ours = self.state_dict(int(state.get("step", 0)))
        differing = [
            f"{name} was {state.get(name, 'not saved')}, is {ours[name]}" for name in ours if state.get(name) != ours[name]
        ]
        if differing:
            raise ValueError(
                "The saved data cursor belongs to another stream: " + "; ".join(differing) + ". Resume with the data and "
                "settings of the run, or start a new run from its weights."
            )


class EvaluationLoader:
    """Every sample exactly once over all ranks, in order, in equally many full batches on every rank.

    Batch b of rank r holds samples [(b·world_size + r)·batch_size, …); what is missing at the end is padding with weight 0
    and id -1. An undecodable sample becomes padding too, is counted in `num_bad`, and raises beyond
    `data.max_bad_samples`; summed over ranks, weights + num_bad is the size of the set.
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
        self._reads = _EvaluationReads(shards, transform)
        self._collate = collate
        self._bad = _BadSamples(config.max_bad_samples)
        self._loader: DataLoader | None = None

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

    def __iter__(self) -> Iterator[ImageBatch]:
        if self._loader is None:
            self._loader = _make_loader(self._reads, self._id_lists(), self._collate, self.config, True)
        with signals_held():
            iterator = iter(self._loader)
        for loaded in iterator:
            self._bad.add(loaded.bad)
            yield loaded.batch

    def close(self) -> None:
        """Stop the workers, which otherwise stay for the next evaluation."""
        self._loader = None
