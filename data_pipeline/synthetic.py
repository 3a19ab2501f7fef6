"""Endless batches of the right type without data, to measure everything but the reading."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from data_pipeline.batch import ImageBatch, VideoBatch


class SyntheticBatches:
    """Endless random batches with the interface of a training loader; a pure function of (seed, step).

    `input_size` (H, W) gives `ImageBatch`es, (T, H, W) `VideoBatch`es of training clips.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        num_classes: int,
        micro_batch_size: int,
        *,
        seed: int = 0,
        num_distinct: int = 4,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        made = (
            (
                torch.randint(256, (micro_batch_size, *input_size, 3), generator=generator, dtype=torch.uint8),
                torch.randint(num_classes, (micro_batch_size,), generator=generator),
            )
            for _ in range(num_distinct)
        )
        batch_type = VideoBatch if len(input_size) == 3 else ImageBatch
        self._batches = [
            batch_type(
                pixels.movedim(-1, 1),
                labels=labels,
                weights=torch.ones(micro_batch_size),
                sample_ids=torch.arange(which * micro_batch_size, (which + 1) * micro_batch_size),
                keys=tuple(f"synthetic/{which * micro_batch_size + i:06d}" for i in range(micro_batch_size)),
            )
            for which, (pixels, labels) in enumerate(made)
        ]
        self.num_bad = 0

    def start(self, step: int = 0) -> Iterator[Any]:
        """Return endless batches; a few distinct ones take turns."""
        for number in count(step):
            yield self._batches[number % len(self._batches)]

    def __iter__(self) -> Iterator[Any]:
        return self.start()

    def close(self) -> None:
        """Do nothing: there are no workers."""
