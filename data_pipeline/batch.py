"""Typed batches: what a loader yields and a task receives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 arrays of one shape (B, …); in a worker right into the memory that the training process will see."""
    if get_worker_info() is None:
        return torch.from_numpy(np.stack(arrays))
    shape = (len(arrays), *arrays[0].shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does
    batch = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]
    np.stack(arrays, out=batch.numpy())
    return batch


@dataclass(frozen=True)
class ImageBatch:
    """A batch of B images of one size, still uint8: normalising, erasing and mixing happen on the device.

    Shapes: images (B, 3, H, W) uint8 with channels-last strides; labels (B,) int64; weights (B,) float32, 0
    marks padding in evaluation; sample_ids (B,) int64 indices in the shard set, -1 for padding; keys: one
    "shard.tar/sample" per image, for error messages.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    sample_ids: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> Tensor:
        """The images, by the name that clips have too."""
        return self.images

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ImageBatch":
        """Return the batch with its tensors on `device`; asynchronous only if the batch is pinned."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ImageBatch":
        """Return the batch in page-locked memory (torch's DataLoader calls this by name)."""
        return _each_tensor(self, Tensor.pin_memory)


@dataclass(frozen=True)
class VideoBatch:
    """A batch of B clips of one size, or of B videos with V views each, still uint8.

    Shapes: clips (B, 3, T, H, W) in training, (B, V, 3, T, H, W) in evaluation, uint8, channels last in memory; the
    others as in `ImageBatch`, one per clip in training and one per video in evaluation.
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    sample_ids: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> Tensor:
        """The clips, by the name that images have too."""
        return self.clips

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "VideoBatch":
        """Return the batch with its tensors on `device`; asynchronous only if the batch is pinned."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VideoBatch":
        """Return the batch in page-locked memory (torch's DataLoader calls this by name)."""
        return _each_tensor(self, Tensor.pin_memory)


@dataclass(frozen=True)
class DetectionBatch:
    """A batch of B images of different sizes with their objects, padded at the right and the bottom, still uint8.

    Shapes: images (B, 3, H, W) uint8 with channels-last strides, filled up with the mean colour; sizes (B, 2) int64,
    the height and width that are picture; original_sizes (B, 2) int64, before augmentation and resizing; image_ids
    (B,) int64 of the source, -1 for padding; weights, sample_ids and keys as in `ImageBatch`. The objects of all images
    lie behind one another, which makes one transfer of them: all_boxes (M, 4) float32, XYXY in pixels of the padded
    image; all_labels (M,) int64; all_is_crowd (M,) bool; all_masks (M, H, W) bool, None without masks; num_objects: how
    many of the M are each image's. `boxes`, `labels`, `is_crowd` and `masks` are tuples of one view per image.

    In a test of several views, of which `images` is the first: view_sizes: of each image the (h, w) of every view;
    all_views: their bytes behind one another, channels last; `views` takes them apart.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    weights: Tensor
    sample_ids: Tensor
    keys: tuple[str, ...]
    num_objects: tuple[int, ...]
    all_boxes: Tensor
    all_labels: Tensor
    all_is_crowd: Tensor
    all_masks: Tensor | None
    view_sizes: tuple[tuple[tuple[int, int], ...], ...] = ()
    all_views: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> Tensor:
        """The images, by the name that clips have too."""
        return self.images

    @property
    def boxes(self) -> tuple[Tensor, ...]:
        """Boxes (N, 4) float32 of each image."""
        return self.all_boxes.split(self.num_objects)

    @property
    def labels(self) -> tuple[Tensor, ...]:
        """Class numbers (N,) int64 of each image's objects, from 0."""
        return self.all_labels.split(self.num_objects)

    @property
    def is_crowd(self) -> tuple[Tensor, ...]:
        """Whether each object is a crowd region, (N,) bool, for each image."""
        return self.all_is_crowd.split(self.num_objects)

    @property
    def masks(self) -> tuple[Tensor, ...] | None:
        """Masks (N, H, W) bool of each image's objects, as large as the padded images; None without masks."""
        return None if self.all_masks is None else self.all_masks.split(self.num_objects)

    @property
    def views(self) -> tuple[tuple[Tensor, ...], ...]:
        """Views (3, h, w) uint8 of each image in a test of several, without padding; else no image is in here."""
        if self.all_views is None:
            return ()
        sizes = [size for image in self.view_sizes for size in image]
        parts = self.all_views.split([3 * height * width for height, width in sizes])
        views = iter([part.view(*size, 3).permute(2, 0, 1) for part, size in zip(parts, sizes, strict=True)])
        return tuple(tuple(next(views) for _ in image) for image in self.view_sizes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "DetectionBatch":
        """Return the batch with its tensors on `device`; asynchronous only if the batch is pinned."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "DetectionBatch":
        """Return the batch in page-locked memory (torch's DataLoader calls this by name)."""
        return _each_tensor(self, Tensor.pin_memory)


_Batch = TypeVar("_Batch", ImageBatch, VideoBatch, DetectionBatch)


def _each_tensor(batch: _Batch, change: Callable[[Tensor], Tensor]) -> _Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})
