"""RandAugment on PIL pictures and clips of them: timm's implementation, made a pure function of (picture, seed).

PIL's operations cost a third of torchvision's tensor operations on one core, so this runs in the workers. The module
imports timm, which takes seconds; only training transforms import it.
"""

from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform

from data_pipeline.seeding import seeded_python


class RandAugment:
    """Apply timm's RandAugment as the published training does.

    `policy` is timm's string, e.g. "rand-m9-n6-mstd0.5-inc1": 6 of 15 operations, each applied with probability 0.5.
    Holes are filled with the mean colour; translations reach 0.45 of the short side.
    """

    def __init__(
        self, policy: str, size: tuple[int, int], mean: tuple[float, float, float], resample: Image.Resampling
    ) -> None:
        hparams = {
            "translate_const": int(0.45 * min(size)),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
            "interpolation": resample,
        }
        self._augment = rand_augment_transform(policy, hparams)
        for operation in self._augment.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        with seeded_python(seed):  # timm draws from the global generators of random and numpy
            return self._augment(image)


class ClipRandAugment:
    """Apply the same operations with the same strengths and directions to all frames of a clip, as SlowFast does.

    Holes are grey (128) and translations reach 0.45 of the frame's short side, since it is not cropped yet.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def __call__(self, frames: np.ndarray, seed: int) -> np.ndarray:
        """Return frames (T, H, W, 3) uint8, augmented."""
        augment = RandAugment(self._policy, frames.shape[1:3], (0.5, 0.5, 0.5), Image.Resampling.BICUBIC)
        return np.stack([np.asarray(augment(Image.fromarray(frame), seed)) for frame in frames])


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep no bit as Pillow did before 13, which raises: at full strength the published policy asks for black."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **options)
