"""Typed batches: what a loader yields and a task receives."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ImageBatch":
        """Return the batch with its tensors on `device`; asynchronous only if the batch is pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "ImageBatch":
        """Return the batch in page-locked memory (torch's DataLoader calls this by name)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
        )
