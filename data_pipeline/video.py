"""Clips for classification: which frames of a video are taken, the published augmentation, and the test views.

Frames are chosen by presentation time, so that a variable or unusual frame rate is right. Normalising, erasing and
mixing happen on the device (mixup.py), so that a batch travels as bytes. Pictures are resized bilinearly without
averaging, as SlowFast and torchvision do with clips: shards packed at a short side near 320 lose nothing by it.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator

from data_pipeline.augment_config import AugmentConfig
from data_pipeline.batch import VideoBatch, stacked
from data_pipeline.decode import LABEL_EXTENSION, UNLABELLED, class_label
from data_pipeline.image import random_crop_box
from data_pipeline.order import derive_seed
from data_pipeline.reads import Item
from data_pipeline.video_container import VIDEO_EXTENSIONS
from data_pipeline.video_decode import Video, check_decoder, video_member

if TYPE_CHECKING:
    from data_pipeline.augment import ClipRandAugment

VIDEO_MEMBERS: tuple[tuple[str, ...], ...] = (VIDEO_EXTENSIONS, (LABEL_EXTENSION,))
"""What every sample of a shard must have, one of each group."""

_TICK_S = 6e-4
"""Containers round presentation times, Matroska's to milliseconds: a frame that begins so little later is there."""


class VideoConfig(AugmentConfig):
    """Sampling, augmentation and test views of videos; the defaults are MViTv2-S's for Kinetics (appendix B.4)."""

    num_frames: int = Field(default=16, ge=2)
    """Frames of a clip, T."""
    frame_stride: int = Field(default=4, ge=1)
    """Dense sampling: frames at `target_fps` from one of the clip's to the next; a clip lasts T x stride / fps."""
    target_fps: float = Field(default=30.0, gt=0)
    """Dense sampling: the frame rate that `frame_stride` counts in, whatever a video's own is."""
    sampling: Literal["dense", "segments"] = "dense"
    """"dense": a clip of fixed duration from anywhere in the video (Kinetics). "segments": the whole video in T equal
    segments, one frame of each (Something-Something)."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What reads the videos; torchcodec must be installed by hand and needs the system's FFmpeg."""
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    rand_augment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """timm's RandAugment policy, the same operations on all frames and before the crop; None for none."""
    crop: Literal["area", "jitter"] = "area"
    """Training crop: "area" of random area and aspect (`crop_scale`, `crop_ratio`), "jitter" of image_size from the
    frame resized to a random short side (`jitter`)."""
    jitter: tuple[int, int] = (256, 320)
    """Training crop "jitter": range of the short side in pixels."""
    jitter_inverse: bool = False
    """Draw the short side uniformly in 1 / side instead of in side."""
    repeats: int = Field(default=1, ge=1)
    """Repeated augmentation: clips of one video that follow each other in the stream; 2 in the Kinetics recipes."""

    short_side: int = Field(default=256, ge=1)
    """Evaluation with one crop: the short side is resized to this, then the centre is cut out."""
    num_clips: int = Field(default=5, ge=1)
    """Test: clips of a video, evenly spread over it. Evaluations during training look at one clip and one crop."""
    num_crops: int = Field(default=1, ge=1)
    """Test: crops of a clip. With more than one the short side is the crop's, and they are spread evenly along the
    longer side: 3 are left, centre and right."""

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        largest = max(self.image_size)
        if self.short_side < largest:
            raise ValueError(
                f"short_side {self.short_side} is less than image_size {self.image_size} needs; raise it to {largest}"
            )
        if not 1 <= self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter {self.jitter} must rise and be positive")
        if self.crop == "jitter" and self.jitter[0] < largest:
            raise ValueError(f"jitter {self.jitter} begins below what image_size {self.image_size} needs: {largest}")
        if self.sampling == "segments" and self.num_clips > 1:
            raise ValueError(
                f"num_clips {self.num_clips} with sampling 'segments': each clip would be the same, since one spans "
                "the whole video; set num_clips=1 (num_crops may be more)"
            )
        return self

    @property
    def views(self) -> int:
        """Clips of a video that a test looks at, over time and space."""
        return self.num_clips * self.num_crops

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """Frames, height and width of what the model sees."""
        return (self.num_frames, *self.image_size)

    def single_view(self) -> Self:
        """Return the settings with one centre clip and one centre crop, for evaluations during training."""
        return self.model_copy(update={"num_clips": 1, "num_crops": 1})


class VideoTransform:
    """Turn a sample's members into (uint8 clip (T, H, W, 3), class label); a pure function of (members, seed).

    `train`: frames, crop, flip and RandAugment drawn from the seed. Otherwise (V, T, H, W, 3), the config's views of
    the video, clip by clip and of each crop by crop; the seed is ignored. A video shorter than a clip holds its last
    frame. Raises DecodeError for a sample without a readable video or label.
    """

    def __init__(self, config: VideoConfig, train: bool) -> None:
        self.config, self.train = config, train
        check_decoder(config.decoder)  # here, not in a worker in the middle of a run
        self._rand_augment = _rand_augment(config) if train else None

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[np.ndarray, int]:
        label = class_label(members)
        with Video(video_member(members), self.config.decoder) as video:
            if self.train:
                frames = video.frames(training_frames(video.times, self.config, derive_seed(seed, "frames")).tolist())
                return self._augmented(frames, seed), label
            return self._all_views(video), label

    def unlabelled(self, data: bytes) -> tuple[np.ndarray, int]:
        """Turn an encoded video whose class is not known into an example as in evaluation. Raises DecodeError."""
        with Video(data, self.config.decoder) as video:
            return self._all_views(video), UNLABELLED

    def padding(self) -> tuple[np.ndarray, int]:
        """Return the example that fills up an evaluation batch."""
        views = () if self.train else (self.config.views,)
        return np.zeros((*views, *self.config.clip_size, 3), np.uint8), 0

    def _all_views(self, video: Video) -> np.ndarray:
        clips = (video.frames(indices.tolist()) for indices in evaluation_frames(video.times, self.config))
        return np.stack([view for clip in clips for view in _views(clip, self.config)])

    def _augmented(self, frames: np.ndarray, seed: int) -> np.ndarray:
        draws = random.Random(seed)
        if self._rand_augment is not None:
            frames = self._rand_augment(frames, derive_seed(seed, "rand_augment"))
        crop = _area_crop if self.config.crop == "area" else _jitter_crop
        frames = crop(frames, self.config, draws)
        if draws.random() < self.config.hflip_prob:
            frames = frames[:, :, ::-1]
        return np.ascontiguousarray(frames)


def collate_videos(items: Sequence[Item]) -> VideoBatch:
    """Stack (clip, label) examples, or (views, label) ones of an evaluation, into a `VideoBatch`."""
    pixels = stacked([item.example[0] for item in items])
    return VideoBatch(
        clips=pixels.movedim(-1, -4),  # (…, T, H, W, 3) in memory
        labels=torch.tensor([item.example[1] for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        sample_ids=torch.tensor([item.sample_id for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
    )


# --- which frames: pure functions of the frames' times and a seed -----------------------------------------------


def training_frames(times: np.ndarray, config: VideoConfig, seed: int) -> np.ndarray:
    """Return the indices (T,) of a training clip's frames; `times`: presentation seconds of all, rising from 0."""
    draws = random.Random(seed)
    if config.sampling == "segments":
        return np.array([draws.randint(first, last) for first, last in _segments(len(times), config.num_frames)])
    return _dense(times, config, draws.uniform(0, _last_start(times, config)))


def evaluation_frames(times: np.ndarray, config: VideoConfig) -> list[np.ndarray]:
    """Return the indices (T,) of each test clip's frames: starts evenly from 0 to the last possible one.

    A single clip is the one in the middle; of segments the middle frames.
    """
    if config.sampling == "segments":
        return [np.array([(first + last) // 2 for first, last in _segments(len(times), config.num_frames)])]
    last = _last_start(times, config)
    starts = np.linspace(0, last, config.num_clips) if config.num_clips > 1 else [last / 2]
    return [_dense(times, config, float(start)) for start in starts]


def _dense(times: np.ndarray, config: VideoConfig, start: float) -> np.ndarray:
    """Return the frames shown at T times evenly over the clip, from its first frame's to its last one's."""
    length = (config.num_frames * config.frame_stride - 1) / config.target_fps
    wanted = start + np.linspace(0, length, config.num_frames)
    return np.maximum(np.searchsorted(times, wanted + _TICK_S, side="right") - 1, 0)


def _last_start(times: np.ndarray, config: VideoConfig) -> float:
    """Return the latest start of a clip that ends with the video; 0 for a video that is shorter."""
    last_frame = float(np.median(np.diff(times))) if len(times) > 1 else 0.0  # its duration is not told
    return max(float(times[-1]) + last_frame - config.num_frames * config.frame_stride / config.target_fps, 0.0)


def _segments(num_frames: int, number: int) -> list[tuple[int, int]]:
    """Return the first and last frame of `number` equal segments, which share their borders as in SlowFast."""
    borders = np.rint(np.arange(number + 1) * ((num_frames - 1) / number)).astype(int).tolist()
    return list(pairwise(borders))


# --- which part of the picture ----------------------------------------------------------------------------------


def _rand_augment(config: VideoConfig) -> "ClipRandAugment | None":
    if config.rand_augment is None:
        return None
    from data_pipeline.augment import ClipRandAugment

    return ClipRandAugment(config.rand_augment)


def _area_crop(frames: np.ndarray, config: VideoConfig, draws: random.Random) -> np.ndarray:
    """Cut one random box out of all frames (T, H, W, 3) and resize it."""
    _, height, width, _ = frames.shape
    top, left, height, width = random_crop_box(height, width, config.crop_scale, config.crop_ratio, draws)
    return _resize(frames[:, top : top + height, left : left + width], config.image_size)


def _jitter_crop(frames: np.ndarray, config: VideoConfig, draws: random.Random) -> np.ndarray:
    """Resize all frames to a random short side and cut image_size out at random."""
    least, most = config.jitter
    side = 1 / draws.uniform(1 / most, 1 / least) if config.jitter_inverse else draws.uniform(least, most)
    frames, (height, width) = _with_short_side(frames, round(side)), config.image_size
    top, left = draws.randint(0, frames.shape[1] - height), draws.randint(0, frames.shape[2] - width)
    return frames[:, top : top + height, left : left + width]


def _views(frames: np.ndarray, config: VideoConfig) -> list[np.ndarray]:
    """Return the test crops of a clip: its centre, or several along the longer side."""
    (height, width), number = config.image_size, config.num_crops
    frames = _with_short_side(frames, config.short_side if number == 1 else max(height, width))
    spare = frames.shape[1] - height, frames.shape[2] - width
    along = 0 if frames.shape[1] > frames.shape[2] else 1
    views = []
    for crop in range(number):
        top, left = (
            math.ceil(spare[axis] * crop / (number - 1)) if number > 1 and axis == along else math.ceil(spare[axis] / 2)
            for axis in (0, 1)
        )
        views.append(frames[:, top : top + height, left : left + width])
    return views


def _with_short_side(frames: np.ndarray, side: int) -> np.ndarray:
    """Resize to a short side, the long one rounded down, as SlowFast does."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    return _resize(frames, (height * side // short, width * side // short))


def _resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frames.shape[1:3] == size:
        return frames
    return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR) for frame in frames])
