"""RandAugment on pictures and clips of them: timm's draws and strengths, made a pure function of (pixels, seed).

It runs in the workers, on uint8: torchvision's tensor operations cost three times PIL's on one core, ours on arrays
half of PIL's. The module imports timm, which takes seconds; only training transforms import it.
"""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm

from data_pipeline import augment_ops as ours
from data_pipeline.seeding import seeded_python


class RandAugment:
    """Apply timm's RandAugment as the published training does.

    `policy` is timm's string, e.g. "rand-m9-n6-mstd0.5-inc1": 6 of 15 operations, each applied with probability 0.5.
    Holes are filled with the mean colour; translations reach 0.45 of the width or height. `exact`: with PIL's own
    operations; otherwise on arrays, in half the time, and each at most one level away.
    """

    def __init__(
        self,
        policy: str,
        size: tuple[int, int],
        mean: tuple[float, float, float],
        resample: Image.Resampling,
        *,
        exact: bool = False,
    ) -> None:
        self._augment, self._exact = timm_rand_augment(policy, size, mean, resample), exact
        if not exact:
            for operation in self._augment.ops:
                operation.aug_fn = _ON_ARRAYS.get(operation.aug_fn) or partial(ours.by_pil, operation.aug_fn)

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """Return pixels (H, W, 3) uint8, augmented."""
        with seeded_python(seed):  # timm draws from the global generators of random and numpy
            if self._exact:
                return np.asarray(self._augment(Image.fromarray(pixels)))
            return self._augment(ours.Pixels(pixels)).array()


class ClipRandAugment:
    """Apply the same operations with the same strengths and directions to all frames of a clip, as SlowFast does.

    Holes are grey (128) and translations reach 0.45 of the frame's sides, since it is not cropped yet.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def __call__(self, frames: np.ndarray, seed: int) -> np.ndarray:
        """Return frames (T, H, W, 3) uint8, augmented."""
        augment = RandAugment(self._policy, frames.shape[1:3], (0.5, 0.5, 0.5), Image.Resampling.BICUBIC)
        return np.stack([augment(frame, seed) for frame in frames])


def timm_rand_augment(
    policy: str, size: tuple[int, int], mean: tuple[float, float, float], resample: Image.Resampling
) -> Any:
    """Return timm's own RandAugment for PIL pictures, as the published training configures it."""
    hparams = {
        "translate_const": int(0.45 * min(size)),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": resample,
    }
    augment = timm.rand_augment_transform(policy, hparams)
    for operation in augment.ops:
        if operation.aug_fn is timm.posterize:
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep no bit as Pillow did before 13, which raises: at full strength the published policy asks for black."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return timm.posterize(image, bits_to_keep, **options)


_ON_ARRAYS = {
    timm.auto_contrast: ours.auto_contrast,
    timm.equalize: ours.equalize,
    timm.invert: ours.invert,
    _posterize: ours.posterize,
    timm.solarize: ours.solarize,
    timm.solarize_add: ours.solarize_add,
    timm.brightness: ours.brightness,
    timm.contrast: ours.contrast,
    timm.color: ours.color,
    timm.sharpness: ours.sharpness,
    timm.shear_x: ours.shear_x,
    timm.shear_y: ours.shear_y,
    timm.translate_x_rel: ours.translate_x,
    timm.translate_y_rel: ours.translate_y,
}
"""The rest, rotation above all, goes through PIL: cv2's bicubic is another one, a level away on average."""
