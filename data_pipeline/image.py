"""Images for classification: the published augmentation, the published evaluation crop, and batches of uint8.

Only what needs the single picture happens here, in the workers. Normalising, erasing and mixing happen on the device
(mixup.py), so that a batch travels as bytes.
"""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch.nn.functional import interpolate

from data_pipeline.augment_config import AugmentConfig
from data_pipeline.batch import ImageBatch, stacked
from data_pipeline.decode import UNLABELLED, class_label, decode_crop_fast, decode_pil, decode_rgb, jpeg_size, picture
from data_pipeline.order import derive_seed
from data_pipeline.reads import Item

if TYPE_CHECKING:
    from data_pipeline.augment import RandAugment

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageConfig(AugmentConfig):
    """Augmentation and evaluation of still pictures; the defaults are MViTv2's for ImageNet-1K (appendix B.2)."""

    decoder: Literal["fast", "pil"] = "fast"
    """Training only: "fast" reads JPEGs with a quick inverse DCT, no row below the crop, and arrays for PIL's
    pictures; "pil" is timm's way, bit for bit, at half the speed. Evaluation gives PIL's pixels either way."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling, in training also of RandAugment's moves."""
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    """Evaluation: the short side is resized to image_size / crop_pct, then the centre is cut out."""
    full_resize: bool = False
    """Evaluation: resize the whole picture to image_size instead, whatever its shape."""
    evaluated_classes: int | None = Field(default=None, gt=0)
    """Evaluation: only the first so many logits compete; null: all. 1000 in ImageNet-21K pre-training, whose joint head
    begins with ImageNet-1K's classes, so that it is validated on ImageNet-1K as published."""


class ImageTransform:
    """Turn a sample's members into (uint8 picture (H, W, 3), class label); a pure function of (members, seed).

    `train`: random crop, flip and RandAugment drawn from the seed; otherwise timm's evaluation, pixel for pixel, and
    the seed is ignored. Raises DecodeError for a sample without a readable picture or label.
    """

    def __init__(self, config: ImageConfig, train: bool) -> None:
        self.config, self.train = config, train
        self._rand_augment = rand_augment(config) if train else None

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[np.ndarray, int]:
        label = class_label(members)
        data = picture(members)
        return (self._augmented(data, seed) if self.train else _evaluated(data, self.config)), label

    def unlabelled(self, data: bytes) -> tuple[np.ndarray, int]:
        """Turn an encoded picture whose class is not known into an example as in evaluation. Raises DecodeError."""
        return _evaluated(data, self.config), UNLABELLED

    def padding(self) -> tuple[np.ndarray, int]:
        """Return the example that fills up an evaluation batch."""
        return np.zeros((*self.config.image_size, 3), np.uint8), 0

    def _augmented(self, data: bytes, seed: int) -> np.ndarray:
        draws = random.Random(seed)
        if self.config.decoder == "pil":
            pixels = _random_crop_pil(data, self.config, draws)
        else:
            pixels = _random_crop_fast(data, self.config, draws)
        if draws.random() < self.config.hflip_prob:
            pixels = cv2.flip(pixels, 1)
        if self._rand_augment is not None:
            pixels = self._rand_augment(pixels, derive_seed(seed, "rand_augment"))
        return pixels


def rand_augment(config: ImageConfig) -> "RandAugment | None":
    """Return the config's RandAugment, None if it has none."""
    if config.rand_augment is None:
        return None
    from data_pipeline.augment import RandAugment

    resample, exact = RESAMPLING[config.interpolation], config.decoder == "pil"
    return RandAugment(config.rand_augment, config.image_size, config.mean, resample, exact=exact)


def collate_images(items: Sequence[Item]) -> ImageBatch:
    """Stack (picture, label) examples into an `ImageBatch`."""
    pixels = stacked([item.example[0] for item in items])
    return ImageBatch(
        images=pixels.permute(0, 3, 1, 2),  # (B, H, W, 3) in memory: channels-last for free
        labels=torch.tensor([item.example[1] for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        sample_ids=torch.tensor([item.sample_id for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
    )


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: random.Random
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) of random area and aspect, as torchvision's RandomResizedCrop does.

    After ten draws that do not fit, the largest central crop whose aspect is within `ratio`.
    """
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = draws.randint(0, height - crop_height), draws.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = min(width, round(height * ratio[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _random_crop_fast(data: bytes, config: ImageConfig, draws: random.Random) -> np.ndarray:
    """Crop and resize with the fast codec; large JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop allows."""
    size = jpeg_size(data)
    if size is None:
        whole = decode_rgb(data)
        height, width = whole.shape[:2]
        top, left, height, width = random_crop_box(height, width, config.crop_scale, config.crop_ratio, draws)
        return _resize(whole[top : top + height, left : left + width], config)
    box = random_crop_box(*size, config.crop_scale, config.crop_ratio, draws)
    # Not below twice the size needed, so that there are pixels left to average: at 64 px that halves the distance to
    # PIL's pixels and costs a fifth of the speed; at 224 px it hardly ever matters.
    return _resize(decode_crop_fast(data, box, (2 * config.image_size[0], 2 * config.image_size[1])), config)


def _resize(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Resize to image_size as PIL does, within a level, in a fifth of its time: torch has a kernel for bytes."""
    pixels = np.ascontiguousarray(pixels) if pixels.flags.writeable else pixels.copy()
    # (1, H, W, 3) in memory: of a picture without the first axis torch does not see that it is channels-last
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    batch = interpolate(batch, config.image_size, mode=config.interpolation, antialias=True)
    return batch.permute(0, 2, 3, 1)[0].numpy()


def _random_crop_pil(data: bytes, config: ImageConfig, draws: random.Random) -> np.ndarray:
    """Crop and resize as torchvision and timm do on PIL pictures."""
    image = decode_pil(data)
    top, left, height, width = random_crop_box(image.height, image.width, config.crop_scale, config.crop_ratio, draws)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((config.image_size[1], config.image_size[0]), RESAMPLING[config.interpolation]))


def _evaluated(data: bytes, config: ImageConfig) -> np.ndarray:
    """Resize and cut out the centre; equal to timm's evaluation transform, whose rounding it follows."""
    image = Image.fromarray(decode_rgb(data))
    resample = RESAMPLING[config.interpolation]
    height, width = config.image_size
    if config.full_resize:
        return np.asarray(image.resize((width, height), resample))
    short = math.floor(height / config.crop_pct), math.floor(width / config.crop_pct)
    if short[0] == short[1]:
        # torchvision truncates the long side, timm's ResizeKeepRatio (for non-square sizes) rounds both
        if image.width <= image.height:
            size = short[0], int(short[0] * image.height / image.width)
        else:
            size = int(short[0] * image.width / image.height), short[0]
    else:
        factor = min(image.height / short[0], image.width / short[1])
        size = round(image.width / factor), round(image.height / factor)
    image = image.resize(size, resample)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))
