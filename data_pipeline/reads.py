"""What workers do: read samples, transform them, and deal with those that cannot be decoded."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset

from data_pipeline.decode import DecodeError
from data_pipeline.download import FetchCounts
from data_pipeline.order import Stream
from data_pipeline.shards import ShardSet

logger = logging.getLogger(__name__)


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


class Read(NamedTuple):
    """What was read for one batch."""

    items: list[Item]
    bad: list[BadSample]
    fetched: FetchCounts | None


class Loaded(NamedTuple):
    """What a worker hands over: a batch, and what happened while making it."""

    batch: Any
    bad: tuple[BadSample, ...]
    fetched: FetchCounts | None = None
    """What the worker has fetched and waited for remote shards since its last batch; None if none is remote."""


class Transform(Protocol):
    """A picklable, pure function from a sample's members and a seed to one example; DecodeError marks a bad sample."""

    def __call__(self, members: dict[str, bytes], seed: int) -> Any: ...

    def padding(self) -> Any:
        """Return an example of the right shape that stands for no sample."""
        ...


Collate = Callable[[Sequence[Item]], Any]


class TrainingReads(Dataset):
    """Reads the samples of one chunk; replaces undecodable ones by the next readable sample of the epoch's order."""

    def __init__(self, shards: ShardSet, transform: Transform, stream: Stream) -> None:
        self.shards, self.transform, self.stream = shards, transform, stream

    def __getitems__(self, draws: list[tuple[int, int, int]]) -> Read:
        bad: list[BadSample] = []
        return Read([self._read(*draw, bad) for draw in draws], bad, self.shards.take_counts())

    def _read(self, position: int, epoch: int, sample_id: int, bad: list[BadSample]) -> Item:
        chosen, seed = sample_id, self.stream.augmentation_seed(position, epoch, sample_id)
        for tries in range(1, self.stream.num_samples + 1):
            try:
                return Item(self.transform(self.shards.read(chosen), seed), chosen, self.shards.key(chosen), 1.0)
            except DecodeError as error:
                bad.append(BadSample(chosen, self.shards.key(chosen), str(error)))
            # The replacement keeps the bad sample's seed: elsewhere in the epoch it is augmented with its own.
            chosen = self.stream.following(position, tries)
        raise BadSampleError(f"None of the {self.stream.num_samples} training samples can be decoded; last: {bad[-1]}.")


class EvaluationReads(Dataset):
    """Reads samples in order; padding (-1) and undecodable samples become examples of weight 0."""

    def __init__(self, shards: ShardSet, transform: Transform) -> None:
        self.shards, self.transform = shards, transform

    def __getitems__(self, ids: list[int]) -> Read:
        bad: list[BadSample] = []
        return Read([self._read(sample_id, bad) for sample_id in ids], bad, self.shards.take_counts())

    def _read(self, sample_id: int, bad: list[BadSample]) -> Item:
        if sample_id >= 0:
            try:
                example = self.transform(self.shards.read(sample_id), 0)
                return Item(example, sample_id, self.shards.key(sample_id), 1.0)
            except DecodeError as error:
                bad.append(BadSample(sample_id, self.shards.key(sample_id), str(error)))
        return Item(self.transform.padding(), -1, "padding", 0.0)


class CollateWithBad:
    """Picklable collate of (items, bad samples) into `Loaded`."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, read: Any) -> Loaded:
        # what __getitems__ returned; torch's types only know a list of samples
        return Loaded(self.collate(read.items), tuple(read.bad), read.fetched)


class BadSamples:
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
