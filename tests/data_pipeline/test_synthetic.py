"""Batches that stand in for data are what the pipeline makes, the same for the same seed, without end."""

from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.batch import DetectionBatch
from data_pipeline.detection_views import DetectionAugmentConfig
from data_pipeline.masks import mask_box
from data_pipeline.synthetic import SyntheticBatches


def same(one: DetectionBatch, two: DetectionBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(two, field.name)) for field in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_pictures_with_objects_come_without_end_and_depend_on_seed_and_step_alone() -> None:
    def batches(seed: int) -> SyntheticBatches:
        return SyntheticBatches((96, 128), 5, 3, seed=seed, num_objects=4)

    first = list(islice(batches(0).start(), 9))
    assert all(isinstance(batch, DetectionBatch) for batch in first)
    assert all(same(*pair) for pair in zip(first[2:], islice(batches(0).start(2), 7), strict=True))
    assert same(first[0], first[4])
    assert not any(same(first[0], other) for other in first[1:4])
    assert not any(same(*pair) for pair in zip(first[:4], batches(1).start(), strict=False))
    assert len({key for batch in first[:4] for key in batch.keys}) == 12
    assert torch.cat([batch.image_ids for batch in first[:4]]).tolist() == list(range(12))


def test_synthetic_pictures_are_padded_and_their_objects_are_right() -> None:
    counts = []
    fill = torch.tensor(DetectionAugmentConfig().fill, dtype=torch.uint8)
    for batch in islice(SyntheticBatches((100, 128), 5, 4, num_distinct=16, num_objects=4), 16):
        assert batch.images.shape == (4, 3, 128, 128)
        assert (batch.images.dtype, batch.all_boxes.dtype, batch.all_labels.dtype, batch.all_masks.dtype) == (
            torch.uint8,
            torch.float32,
            torch.int64,
            torch.bool,
        )
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.weights.tolist() == [1.0] * 4
        assert torch.equal(batch.original_sizes, batch.sizes)
        assert not batch.all_is_crowd.any()
        rows = zip(batch.images, batch.sizes.tolist(), batch.boxes, batch.labels, batch.masks, strict=True)
        for image, (height, width), boxes, labels, masks in rows:
            assert 50 <= height <= 100
            assert 64 <= width <= 128
            assert (image[:, height:] == fill[:, None, None]).all()
            assert (image[:, :, width:] == fill[:, None, None]).all()
            assert ((labels >= 0) & (labels < 5)).all()
            assert not masks[:, height:].any()
            assert not masks[:, :, width:].any()
            assert [mask_box(mask.numpy()) for mask in masks] == [tuple(box) for box in boxes.tolist()]
            counts.append(len(boxes))
    assert min(counts) == 0
    assert max(counts) == 8
    assert np.mean(counts) == pytest.approx(4, abs=1)


def test_masks_may_be_left_out_and_objects_are_not_in_clips() -> None:
    bare = next(iter(SyntheticBatches((64, 64), 5, 2, num_objects=3, masks=False)))
    assert bare.masks is None
    whole = next(iter(SyntheticBatches((64, 64), 5, 2, num_objects=3)))
    assert torch.equal(bare.all_boxes, whole.all_boxes)
    empty = next(iter(SyntheticBatches((64, 64), 5, 2, num_objects=0)))
    assert empty.num_objects == (0, 0)
    with pytest.raises(ValueError, match=r"num_objects = 3, input_size = \(4, 64, 64\): objects are in pictures"):
        SyntheticBatches((4, 64, 64), 5, 2, num_objects=3)
