"""Endless batches of the right type without data, to measure everything but the reading."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import DetectionBatch, ImageBatch, VideoBatch
from data_pipeline.detection import DetectionAugmentConfig, DetectionExample, collate_detections
from data_pipeline.masks import mask_box
from data_pipeline.reads import Item

_SMALLEST_OBJECT = 8  # pixels


class SyntheticBatches:
    """Endless random batches with the interface of a training loader; a pure function of (seed, step).

    `input_size` (H, W) gives `ImageBatch`es, (T, H, W) `VideoBatch`es of training clips. (H, W) and `num_objects` give
    `DetectionBatch`es: pictures of different sizes padded to (H, W), or to the next multiples of 32, each with twice
    `num_objects` ellipses at most, that many on average (COCO has 7.3); with `masks`, their exact masks. Raises
    ValueError for objects in clips.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        num_classes: int,
        micro_batch_size: int,
        *,
        seed: int = 0,
        num_distinct: int = 4,
        num_objects: int | None = None,
        masks: bool = True,
    ) -> None:
        if num_objects is not None and len(input_size) != 2:
            raise ValueError(
                f"num_objects = {num_objects}, input_size = {tuple(input_size)}: objects are in pictures, input_size "
                "(H, W); leave num_objects out for clips"
            )
        self._batches: list[Any] = []
        generator = torch.Generator().manual_seed(seed)
        for number in range(num_distinct):
            ids = range(number * micro_batch_size, (number + 1) * micro_batch_size)
            if num_objects is None:
                self._batches.append(_classified(input_size, num_classes, ids, generator))
            else:
                self._batches.append(_with_objects(input_size, num_classes, ids, num_objects, masks, seed))
        self.num_bad = 0

    def start(self, step: int = 0) -> Iterator[Any]:
        """Return endless batches; a few distinct ones take turns."""
        for number in count(step):
            yield self._batches[number % len(self._batches)]

    def __iter__(self) -> Iterator[Any]:
        return self.start()

    def close(self) -> None:
        """Do nothing: there are no workers."""


def _key(sample_id: int) -> str:
    return f"synthetic/{sample_id:06d}"


def _classified(
    input_size: Sequence[int], num_classes: int, ids: range, generator: torch.Generator
) -> ImageBatch | VideoBatch:
    pixels = torch.randint(256, (len(ids), *input_size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(num_classes, (len(ids),), generator=generator)
    batch_type = VideoBatch if len(input_size) == 3 else ImageBatch
    return batch_type(
        pixels.movedim(-1, 1),
        labels=labels,
        weights=torch.ones(len(ids)),
        sample_ids=torch.tensor(ids),
        keys=tuple(map(_key, ids)),
    )


def _with_objects(
    input_size: Sequence[int], num_classes: int, ids: range, num_objects: int, masks: bool, seed: int
) -> DetectionBatch:
    """Let the pipeline's own collate put pictures together, so that the batch is what training gets."""
    items = [
        Item(_picture(input_size, num_classes, num_objects, masks, seed, sample_id), sample_id, _key(sample_id), 1.0)
        for sample_id in ids
    ]
    return collate_detections(items, DetectionAugmentConfig(masks=masks))


def _picture(
    input_size: Sequence[int], num_classes: int, num_objects: int, masks: bool, seed: int, sample_id: int
) -> DetectionExample:
    draws = np.random.default_rng([seed, sample_id])
    canvas = input_size[0], input_size[1]
    height, width = (int(draws.integers((side + 1) // 2, side + 1)) for side in canvas)
    number = int(draws.integers(2 * num_objects + 1))
    drawn = np.zeros((number, height, width), bool)
    boxes = np.zeros((number, 4), np.float32)
    for mask, box in zip(drawn, boxes, strict=True):
        _draw_ellipse(mask, draws)
        box[:] = mask_box(mask)
    return DetectionExample(
        draws.integers(0, 256, (height, width, 3), np.uint8),
        boxes,
        draws.integers(0, num_classes, number, np.int64),
        np.zeros(number, bool),
        drawn if masks else None,
        (height, width),
        sample_id,
        canvas,
    )


def _draw_ellipse(mask: np.ndarray, draws: np.random.Generator) -> None:
    """Set an ellipse in a mask (h, w): of any size from a few pixels on, small ones as likely as large ones."""
    sides = [
        int(np.exp(draws.uniform(np.log(min(_SMALLEST_OBJECT, extent)), np.log(extent + 1)))) for extent in mask.shape
    ]
    top, left = (int(draws.integers(extent - side + 1)) for extent, side in zip(mask.shape, sides, strict=True))
    y, x = ((2 * np.arange(side) + 1) / side - 1 for side in sides)  # -1 … 1 across the ellipse
    mask[top : top + sides[0], left : left + sides[1]] = y[:, None] ** 2 + x**2 <= 1
