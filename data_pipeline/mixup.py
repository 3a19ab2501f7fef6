"""What happens to a batch of pictures on the device: normalise, erase, mix; timm's RandomErasing and Mixup, seeded.

Order as in the published training: normalise and erase each picture, then mix the micro batch with its mirror image in
batch order, cutmix's weight corrected for clipping. Arithmetic is float32; the result is cast last.
"""

from functools import lru_cache

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from data_pipeline.batch import ImageBatch
from data_pipeline.image import ImageConfig
from data_pipeline.seeding import seeded


def normalize(batch: ImageBatch, config: ImageConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normalised images (B, 3, H, W) in `dtype`, channels-last; in float32 torchvision's bit for bit."""
    return _normalize(batch.images, config).to(dtype)


def check_micro_batch(config: ImageConfig, micro_batch_size: int) -> None:
    """Raise ValueError if mixing is on and a micro batch has nothing to mix with."""
    if config.mixes and micro_batch_size < 2:
        raise ValueError(
            f"micro_batch_size {micro_batch_size} with mixup or cutmix on: each micro batch is mixed with itself in "
            "reverse order and needs at least 2 pictures. Raise micro_batch_size, or set mix_prob to 0."
        )


class DeviceAugment:
    """Turn a training batch on the device into (images (B, 3, H, W) of `dtype`, soft targets (B, K) float32).

    A pure function of (batch, seed, dtype): the global generators are neither read nor moved. Without mixing the
    targets are the smoothed one-hot labels. In a micro batch of odd size the middle picture mixes with itself.
    """

    def __init__(self, config: ImageConfig, num_classes: int) -> None:
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

    def __call__(self, batch: ImageBatch, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        images = _normalize(batch.images, self.config)
        weight = 1.0
        with seeded(seed, images.device):
            if self.config.random_erasing_prob > 0:
                # The device is given per call: timm's default is "cuda".
                erase = RandomErasing(self.config.random_erasing_prob, mode="pixel", device=str(images.device))
                images = erase(images)
            if self.config.mixes:
                # Mixup.__call__ refuses odd batches, which matters for its pairwise modes only; this is its batch mode.
                weight = self._mixup._mix_batch(images)
        targets = mixup_target(batch.labels, self.num_classes, weight, self.config.label_smoothing)
        return images.to(dtype), targets


@lru_cache(maxsize=16)
def _on_device(channels: tuple[float, float, float], device: torch.device) -> Tensor:
    """Keep the constants on the device: copying them each step would wait for it."""
    return torch.tensor(channels, device=device).view(3, 1, 1)


def _normalize(images: Tensor, config: ImageConfig) -> Tensor:
    """Divide by 255, subtract and divide in this order, which is torchvision's, so that not one bit differs."""
    mean, std = _on_device(config.mean, images.device), _on_device(config.std, images.device)
    return images.float().div_(255).sub_(mean).div_(std)
