"""Endless batches of the right type without data, to measure everything but the reading."""

from collections.abc import Iterator
from itertools import count

import torch

from data_pipeline.batch import ImageBatch


class SyntheticImages:
    """Endless random `ImageBatch`es with the interface of a training loader; a pure function of (seed, step)."""

    def __init__(
        self,
        image_size: tuple[int, int],
        num_classes: int,
        micro_batch_size: int,
        *,
        seed: int = 0,
        num_distinct: int = 4,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._batches = [
            ImageBatch(
                images=torch.randint(
                    256, (micro_batch_size, *image_size, 3), generator=generator, dtype=torch.uint8
                ).permute(0, 3, 1, 2),
                labels=torch.randint(num_classes, (micro_batch_size,), generator=generator),
                weights=torch.ones(micro_batch_size),
                sample_ids=torch.arange(which * micro_batch_size, (which + 1) * micro_batch_size),
                keys=tuple(f"synthetic/{which * micro_batch_size + i:06d}" for i in range(micro_batch_size)),
            )
            for which in range(num_distinct)
        ]
        self.num_bad = 0

    def start(self, step: int = 0) -> Iterator[ImageBatch]:
        """Return endless batches; a few distinct ones take turns."""
        for number in count(step):
            yield self._batches[number % len(self._batches)]

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.start()

    def close(self) -> None:
        """Do nothing: there are no workers."""
