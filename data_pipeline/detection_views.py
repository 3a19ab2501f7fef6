"""Which part of a picture a detector sees, how large, and mirrored or not: the published policies as pure geometry.

Every policy is one window of the picture and the size it is resized to, however many resizes and crops it is published
as; pixels are therefore resampled once, and boxes and masks follow the same map.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:  # a config must not cost the import of COCO's library
    from data_pipeline.masks import Window


class DetectionAugmentConfig(Settings):
    """Size, augmentation and test size of pictures with objects; the defaults are MViTv2's for COCO (detectron2)."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means (RGB, 0 to 1) that are subtracted; the colour of padding, so about 0 for the model."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations that are divided by."""
    masks: bool = True
    """Whether batches have masks; without them boxes alone are trained and measured."""
    skip_empty: bool = True
    """Leave pictures without an object, crowds not counted, out of training, as detectron2 does."""
    size_divisibility: int = Field(default=32, ge=1)
    """Height and width of a batch are multiples of this: the stride of the coarsest stage."""

    policy: Literal["multi_scale", "large_scale_jitter", "resize"] = "multi_scale"
    """Training. "multi_scale": as DETR, a random short side, before it in half the cases a random crop.
    "large_scale_jitter": a random scale, then a square cut out or filled up. "resize": as in the test."""
    hflip_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """"multi_scale": short sides to choose from."""
    max_side: int = Field(default=1333, ge=1)
    """"multi_scale": the long side at most; the short one is then less than chosen."""
    crop_prob: float = Field(default=0.5, ge=0, le=1)
    """"multi_scale": probability of the crop."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """"multi_scale": short sides that the picture is resized to before the crop."""
    crop_range: tuple[int, int] = (384, 600)
    """"multi_scale": range of the crop's height and of its width; a smaller picture stays whole."""
    jitter_size: int = Field(default=1024, ge=32)
    """"large_scale_jitter": side of the square that the model sees, and of which `jitter_scale` is a part."""
    jitter_scale: tuple[float, float] = (0.1, 2.0)
    """"large_scale_jitter": range of the factor by which the picture is larger than what would fit into the square."""

    test_short_side: int = Field(default=800, ge=1)
    """Test, and policy "resize": the short side."""
    test_max_side: int = Field(default=1333, ge=1)
    """Test, and policy "resize": the long side at most."""
    test_short_sides: tuple[int, ...] = ()
    """The multi-scale test of `mvit evaluate` and `mvit predict`: short sides to look at each picture at; the long side
    at most grows with them. Empty: `test_short_side` alone, which evaluations during training always take."""
    test_flip: bool = False
    """`mvit evaluate` and `mvit predict`: look at each picture mirrored, too, at every size."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in ("short_sides", "crop_short_sides"):
            sides = getattr(self, name)
            if not sides or min(sides) < 1:
                raise ValueError(f"{name} {sides} must list one short side or more, in pixels above 0: [480, 512]")
        sides = self.test_short_sides
        if sides and min(sides) < 1:
            raise ValueError(f"test_short_sides {sides} must be in pixels above 0: [600, 800, 1000]")
        if len(set(sides)) < len(sides):
            raise ValueError(f"test_short_sides {sides} names a size twice, which would only take longer; take it out")
        if not 1 <= self.crop_range[0] <= self.crop_range[1]:
            raise ValueError(f"crop_range {self.crop_range} must rise and be positive: (384, 600)")
        if not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale {self.jitter_scale} must rise and be positive: (0.1, 2.0)")
        if self.jitter_size % self.size_divisibility:
            raise ValueError(
                f"jitter_size {self.jitter_size} is no multiple of size_divisibility {self.size_divisibility}: 1024"
            )
        for long, short in (("max_side", max(self.short_sides)), ("test_max_side", self.test_short_side)):
            if getattr(self, long) < short:
                raise ValueError(f"{long} {getattr(self, long)} is less than the short side {short}; raise it")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of padding."""
        red, green, blue = (min(255, round(255 * channel)) for channel in self.mean)
        return red, green, blue

    @property
    def num_views(self) -> int:
        """How often the test of `mvit evaluate` looks at a picture."""
        return max(1, len(self.test_short_sides)) * (2 if self.test_flip else 1)

    def single_view(self) -> Self:
        """Return the settings with the plain test, for evaluations during training."""
        return self.model_copy(update={"test_short_sides": (), "test_flip": False})

    @property
    def canvas(self) -> tuple[int, int]:
        """The least height and width of a training batch; large-scale jitter has one size for all."""
        return (self.jitter_size, self.jitter_size) if self.policy == "large_scale_jitter" else (0, 0)


@dataclass(frozen=True)
class View:
    """A window of a picture, resized to `size` and perhaps mirrored."""

    window: "Window"
    size: tuple[int, int]
    """Height and width of what the window becomes."""
    flipped: bool = False

    def pixels(self, picture: np.ndarray) -> np.ndarray:
        """Return what is seen of a picture (H, W, 3) uint8, by PIL's bilinear averaging: (h, w, 3) uint8."""
        height, width = self.size
        if self.window != (0, 0, picture.shape[1], picture.shape[0]) or self.size != picture.shape[:2]:
            image = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR, box=self.window)
            picture = np.asarray(image)
        return np.ascontiguousarray(picture[:, ::-1] if self.flipped else picture)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes (N, 4) XYXY of the picture where they are in the view; they may reach beyond its edges."""
        left, top, right, bottom = self.window
        height, width = self.size
        scale = np.array([width / (right - left), height / (bottom - top)] * 2)
        moved = (boxes - np.array([left, top] * 2)) * scale
        if self.flipped:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        return moved.astype(np.float32)


def training_view(height: int, width: int, config: DetectionAugmentConfig, seed: int) -> View:
    """Draw what is seen of a picture in training; a pure function of its arguments."""
    draws = random.Random(seed)
    view = _POLICIES[config.policy](height, width, config, draws)
    return replace(view, flipped=draws.random() < config.hflip_prob)


def evaluation_view(height: int, width: int, config: DetectionAugmentConfig) -> View:
    """Return the whole picture at the size of the plain test."""
    return View((0, 0, width, height), resized(height, width, config.test_short_side, config.test_max_side))


def evaluation_views(height: int, width: int, config: DetectionAugmentConfig) -> tuple[View, ...]:
    """Return the whole picture at each size of the multi-scale test, without the mirrored ones."""
    sides = config.test_short_sides or (config.test_short_side,)
    most = [config.test_max_side * side / config.test_short_side for side in sides]
    sizes = (resized(height, width, side, longest) for side, longest in zip(sides, most, strict=True))
    return tuple(View((0, 0, width, height), size) for size in sizes)


def resized(height: float, width: float, short_side: int, max_side: float = float("inf")) -> tuple[int, int]:
    """Return (height, width) with the given short side, less if the long one would exceed `max_side`."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _resize(height: int, width: int, config: DetectionAugmentConfig, draws: random.Random) -> View:
    del draws
    return evaluation_view(height, width, config)


def _multi_scale(height: int, width: int, config: DetectionAugmentConfig, draws: random.Random) -> View:
    window: Window = (0, 0, width, height)
    if draws.random() < config.crop_prob:
        rows, columns = resized(height, width, draws.choice(config.crop_short_sides))
        least, most = config.crop_range
        crop_rows = draws.randint(min(rows, least), min(rows, most))
        crop_columns = draws.randint(min(columns, least), min(columns, most))
        top, left = draws.randint(0, rows - crop_rows), draws.randint(0, columns - crop_columns)
        x, y = width / columns, height / rows  # back to the picture's own pixels
        window = left * x, top * y, min((left + crop_columns) * x, width), min((top + crop_rows) * y, height)
        height, width = crop_rows, crop_columns
    return View(window, resized(height, width, draws.choice(config.short_sides), config.max_side))


def _large_scale_jitter(height: int, width: int, config: DetectionAugmentConfig, draws: random.Random) -> View:
    side = config.jitter_size
    scale = draws.uniform(*config.jitter_scale) * side / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = round(max(rows - side, 0) * draws.random()), round(max(columns - side, 0) * draws.random())
    seen_rows, seen_columns = min(rows, side), min(columns, side)
    x, y = width / columns, height / rows
    window = left * x, top * y, min((left + seen_columns) * x, width), min((top + seen_rows) * y, height)
    return View(window, (seen_rows, seen_columns))


_POLICIES: dict[str, Callable[[int, int, DetectionAugmentConfig, random.Random], View]] = {
    "multi_scale": _multi_scale,
    "large_scale_jitter": _large_scale_jitter,
    "resize": _resize,
}
