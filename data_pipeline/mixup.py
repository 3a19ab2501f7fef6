"""What happens to a batch of pictures or clips on the device: normalise, erase, mix; timm's functions, seeded.

Order as in the published training: normalise and erase each picture, then mix the micro batch with its mirror image in
batch order, cutmix's weight corrected for clipping. Arithmetic is float32; the result is cast last.

A clip (3, T, H, W) is erased and mixed as one picture of 3T channels, so that all its frames share the rectangle and
the weight, as published ("cube" erasing); the noise differs from frame to frame.
"""

from functools import lru_cache

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from data_pipeline.augment_config import AugmentConfig
from data_pipeline.batch import ImageBatch, VideoBatch
from data_pipeline.detection_views import DetectionAugmentConfig
from data_pipeline.seeding import seeded


def normalize(batch: ImageBatch | VideoBatch, config: AugmentConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normalised images or clips in `dtype` and the batch's shape; in float32 torchvision's bit for bit.

    Images stay channels-last; clips become contiguous.
    """
    return normalize_pixels(batch.pixels, config).to(dtype)


def check_micro_batch(config: AugmentConfig, micro_batch_size: int) -> None:
    """Raise ValueError if mixing is on and a micro batch has nothing to mix with."""
    if config.mixes and micro_batch_size < 2:
        raise ValueError(
            f"micro_batch_size {micro_batch_size} with mixup or cutmix on: each micro batch is mixed with itself in "
            "reverse order and needs at least 2 pictures. Raise micro_batch_size, or set mix_prob to 0."
        )


class DeviceAugment:
    """Turn a training batch on the device into (images or clips of `dtype`, soft targets (B, K) float32).

    A pure function of (batch, seed, dtype): the global generators are neither read nor moved. Without mixing the
    targets are the smoothed one-hot labels. In a micro batch of odd size the middle one mixes with itself.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes
        self._mixup = Mixup(
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            prob=config.mix_prob,
            switch_prob=config.mix_switch_prob,
            mode="batch",
            label_smoothing=config.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, batch: ImageBatch | VideoBatch, seed: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        pixels = normalize_pixels(batch.pixels, self.config)
        images = pixels.flatten(1, -3) if pixels.ndim == 5 else pixels  # a view: (B, 3, T, H, W) as (B, 3T, H, W)
        weight = 1.0
        with seeded(seed, images.device):
            if self.config.random_erasing_prob > 0:
                # The device is given per call: timm's default is "cuda".
                erase = RandomErasing(self.config.random_erasing_prob, mode="pixel", device=str(images.device))
                erase(images)
            if self.config.mixes:
                # Mixup.__call__ refuses odd batches, which matters for its pairwise modes only; this is its batch mode.
                weight = self._mixup._mix_batch(images)
        targets = mixup_target(batch.labels, self.num_classes, weight, self.config.label_smoothing)
        return pixels.to(dtype), targets


@lru_cache(maxsize=16)
def _on_device(channels: tuple[float, float, float], axes: int, device: torch.device) -> Tensor:
    """Keep the constants on the device: copying them each step would wait for it."""
    return torch.tensor(channels, device=device).view(3, *[1] * axes)


def normalize_pixels(pixels: Tensor, config: AugmentConfig | DetectionAugmentConfig) -> Tensor:
    """Divide by 255, subtract and divide in this order, which is torchvision's, so that not one bit differs.

    Takes (B, 3, H, W) or (B, 3, T, H, W) uint8 and returns float32, of clips contiguous: the order in memory that a
    3-D convolution takes, and that lets a clip be seen as a picture of 3T channels.
    """
    axes = pixels.ndim - 2
    mean, std = _on_device(config.mean, axes, pixels.device), _on_device(config.std, axes, pixels.device)
    order = torch.contiguous_format if axes == 3 else torch.preserve_format
    return pixels.to(torch.float32, memory_format=order).div_(255).sub_(mean).div_(std)
