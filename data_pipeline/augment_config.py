"""The settings of augmentation that pictures and clips have in common; both are subclasses with their own defaults."""

import re
from typing import Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

_POLICY = re.compile(r"rand(-(m\d+|n\d+|p(0?\.\d+|1)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*")


class AugmentConfig(Settings):
    """Size, colours, crop and mixing of what the model sees."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of what the model sees."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means (RGB, 0 to 1) that are subtracted."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations that are divided by."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Training crop: range of its area, as a part of the picture's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training crop: range of its width / height."""
    hflip_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring left to right; 0 for what has a reading direction, such as digits, or names sides."""
    rand_augment: str | None = "rand-m9-n6-mstd0.5-inc1"
    """timm's RandAugment policy; None for none."""
    random_erasing_prob: float = Field(default=0.25, ge=0, le=1)
    """Probability of filling a rectangle (area 2 % to 1/3, aspect 0.3 to 3.3) with noise; in a clip of all frames."""
    mixup_alpha: float = Field(default=0.8, ge=0)
    """Beta parameter of mixup; 0 turns it off."""
    cutmix_alpha: float = Field(default=1.0, ge=0)
    """Beta parameter of cutmix; 0 turns it off."""
    mix_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a micro batch is mixed at all."""
    mix_switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of cutmix rather than mixup where both are on."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Part of the target spread over all classes; also without mixing."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size {self.image_size} must be two positive numbers (height, width)")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must rise within 0 (excluded) to 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio} must rise and be positive")
        if self.rand_augment is not None and not _POLICY.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment {self.rand_augment!r} is no policy timm knows; "
                "e.g. rand-m9-n6-mstd0.5-inc1, or null for none"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self

    @property
    def mixes(self) -> bool:
        """Whether micro batches are mixed."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
