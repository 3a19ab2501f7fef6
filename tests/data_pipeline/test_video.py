"""Clips: the right frames by presentation time, one augmentation for all of them, the published test views."""

import pickle
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from data_pipeline import video as video_module
from data_pipeline.augment import ClipRandAugment
from data_pipeline.decode import DecodeError
from data_pipeline.loader import DataConfig, TrainLoader
from data_pipeline.reads import Item
from data_pipeline.shards import open_shards
from data_pipeline.video import (
    VIDEO_MEMBERS,
    VideoConfig,
    VideoTransform,
    collate_videos,
    evaluation_frames,
    training_frames,
)
from data_pipeline.video_decode import Video
from tests.data_pipeline.clips import clip, scene
from tests.data_pipeline.pictures import write_shards

SMALL = {"image_size": (32, 32), "num_frames": 4, "short_side": 36}
PLAIN = {"rand_augment": None, "hflip_prob": 0.0}


@pytest.fixture(scope="module")
def video() -> bytes:
    return clip(40, rate=30)


def sample(data: bytes, label: int = 3) -> dict[str, bytes]:
    return {"mp4": data, "cls": str(label).encode()}


def even(num_frames: int, fps: float) -> np.ndarray:
    return np.arange(num_frames) / fps


# --- which frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_frames", "stride", "length"), [(16, 4, 300), (32, 3, 200), (40, 3, 120), (4, 5, 21)])
def test_dense_clips_are_slowfasts_at_the_target_rate(num_frames: int, stride: int, length: int) -> None:
    config = VideoConfig(num_frames=num_frames, frame_stride=stride)
    span = num_frames * stride
    for seed in range(30):
        found = training_frames(even(length, 30), config, seed)
        start = random.Random(seed).uniform(0, max(length - span, 0))  # SlowFast: in frames
        expected = torch.linspace(start, start + span - 1, num_frames).clamp(0, length - 1).long()
        assert np.abs(found - expected.numpy()).max() <= 1  # a draw that falls on a frame's edge may round either way
        assert (found == expected.numpy()).mean() > 0.7
    last = max(length - span, 0)
    for view, start in zip(evaluation_frames(even(length, 30), config), np.linspace(0, last, 5), strict=True):
        expected = np.floor(np.linspace(start, start + span - 1, num_frames) + 1e-4).clip(0, length - 1)
        assert (view == expected).all()


@pytest.mark.parametrize("fps", [12, 15, 24, 25, 50, 60, 29.97])
def test_a_clip_lasts_as_long_whatever_the_frame_rate(fps: float) -> None:
    config, times = VideoConfig(num_frames=16, frame_stride=4), even(int(10 * fps), fps)
    for seed in range(10):
        shown = times[training_frames(times, config, seed)]
        assert shown[-1] - shown[0] == pytest.approx(63 / 30, abs=1 / fps + 1e-6)
        assert np.abs(np.diff(shown) - 63 / 30 / 15).max() <= 1 / fps + 1e-6


def test_frames_are_found_by_time_where_the_rate_varies() -> None:
    times = np.concatenate([np.arange(20) / 10, 2 + np.arange(120) / 60])  # 10 a second, then 60
    config = VideoConfig(num_frames=8, frame_stride=15, num_clips=1)
    (found,) = evaluation_frames(times, config)
    wanted = (times[-1] + 1 / 60 - 4) / 2 + np.linspace(0, 119 / 30, 8)
    assert all(
        times[i] <= t + 1e-3 and (i + 1 == len(times) or times[i + 1] > t) for i, t in zip(found, wanted, strict=True)
    )
    rounded = np.round(times, 3)  # as Matroska stores them
    assert (evaluation_frames(rounded, config)[0] == found).all()


def test_a_short_video_holds_its_last_frame() -> None:
    config = VideoConfig(num_frames=8, frame_stride=4)
    for found in (training_frames(even(10, 30), config, 3), *evaluation_frames(even(10, 30), config)):
        assert found.tolist() == [0, 4, 8, 9, 9, 9, 9, 9]
    assert training_frames(even(1, 30), config, 3).tolist() == [0] * 8


@pytest.mark.parametrize("length", [1, 3, 16, 37, 250])
def test_segments_are_slowfasts(length: int) -> None:
    config, number = VideoConfig(num_frames=16, sampling="segments", num_clips=1), 16
    size = (length - 1) / number
    ranges = [(int(np.round(size * i)), int(np.round(size * (i + 1)))) for i in range(number)]
    (middle,) = evaluation_frames(even(length, 12), config)
    assert middle.tolist() == [(first + last) // 2 for first, last in ranges]
    drawn = np.array([training_frames(even(length, 12), config, seed) for seed in range(200)])
    for column, (first, last) in zip(drawn.T, ranges, strict=True):
        assert column.min() >= first
        assert column.max() <= last
        assert last - first > 5 or set(column) == set(range(first, last + 1))


# --- the training clip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["area", "jitter"])
def test_training_is_a_pure_function_of_bytes_and_seed(video: bytes, crop: str) -> None:
    transform = VideoTransform(VideoConfig(**SMALL, crop=crop, jitter=(36, 44)), train=True)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    untouched = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = [transform(sample(video), seed)[0] for seed in range(12)]
    assert (random.random(), np.random.rand(), torch.rand(1)) == untouched
    again = pickle.loads(pickle.dumps(transform))
    assert all(np.array_equal(again(sample(video), seed)[0], first[seed]) for seed in reversed(range(12)))
    assert len({frames.tobytes() for frames in first}) == 12
    assert all(frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8 for frames in first)
    assert transform(sample(video, 7), 0)[1] == 7


def test_all_frames_are_augmented_alike() -> None:
    still = np.stack([scene(5)] * 6)
    augment = ClipRandAugment("rand-m7-n4-mstd0.5-inc1")
    changed = 0
    for seed in range(20):
        frames = augment(still, seed)
        assert all(np.array_equal(frames[0], frame) for frame in frames)
        changed += not np.array_equal(frames[0], still[0])
    assert changed > 15
    config = VideoConfig(**SMALL, frame_stride=1, random_erasing_prob=0)
    data = clip(1)  # one frame, held
    for seed in range(5):
        frames, _ = VideoTransform(config, train=True)(sample(data), seed)
        assert all(np.array_equal(frames[0], frame) for frame in frames)


def test_mirroring_mirrors_all_frames(video: bytes) -> None:
    plain, mirrored = (
        VideoTransform(VideoConfig(**SMALL, rand_augment=None, hflip_prob=p), train=True) for p in (0.0, 1.0)
    )
    for seed in range(3):
        assert np.array_equal(plain(sample(video), seed)[0], mirrored(sample(video), seed)[0][:, :, ::-1])


@pytest.mark.parametrize(("inverse", "mean"), [(False, 64.0), (True, 52.7)])
def test_jitter_draws_the_short_side_from_its_range_and_the_place_at_random(
    monkeypatch: pytest.MonkeyPatch, inverse: bool, mean: float
) -> None:
    """Uniform in 32 to 96 has mean 64; uniform in 1 / side has mean ln(96 / 32) / (1 / 32 - 1 / 96) = 52.7."""
    config = VideoConfig(**SMALL, **PLAIN, crop="jitter", jitter=(32, 96), jitter_inverse=inverse)
    ramp = np.broadcast_to(np.arange(0, 192, 2, np.uint8)[None, None, :, None], (1, 96, 96, 3)).copy()
    sides, lefts = [], []
    resized = video_module._with_short_side

    def noted(frames: np.ndarray, side: int) -> np.ndarray:
        sides.append(side)
        return resized(frames, side)

    monkeypatch.setattr(video_module, "_with_short_side", noted)
    for seed in range(400):
        cut = video_module._jitter_crop(ramp, config, random.Random(seed))
        assert cut.shape == (1, 32, 32, 3)
        lefts.append(int(cut[0, 0, 0, 0]))
    assert (min(sides), max(sides)) == (pytest.approx(32, abs=2), pytest.approx(96, abs=3))
    assert np.mean(sides) == pytest.approx(mean, abs=3)
    assert len(set(lefts)) > 30, "the place differs"


# --- the test views ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_views_are_the_clips_and_crops_of_the_published_test(size: tuple[int, int]) -> None:
    data = clip(40, size, rate=30)
    config = VideoConfig(image_size=(32, 32), num_frames=4, frame_stride=5, short_side=40, num_clips=2, num_crops=3)
    views, _ = VideoTransform(config, train=False)(sample(data), 0)
    assert views.shape == (6, 4, 32, 32, 3) == VideoTransform(config, train=False).padding()[0].shape
    width, height = (42, 32) if size[0] > size[1] else (32, 42)
    with Video(data) as opened:
        clips = [opened.frames(indices.tolist()) for indices in evaluation_frames(opened.times, config)]
    for number, frames in enumerate(clips):
        whole = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        whole = F.interpolate(whole, size=(height, width), mode="bilinear", align_corners=False)  # as SlowFast
        for crop, offset in enumerate((0, 5, 10)):
            top, left = (offset, 0) if height > width else (0, offset)
            expected = whole[:, :, top : top + 32, left : left + 32].permute(0, 2, 3, 1).numpy()
            assert np.abs(views[number * 3 + crop] - expected).max() < 1.01


def test_one_crop_is_the_centre_of_the_resized_frame(video: bytes) -> None:
    config = VideoConfig(**{**SMALL, "short_side": 40}, num_clips=3, num_crops=3).single_view()
    views, _ = VideoTransform(config, train=False)(sample(video), 0)
    assert views.shape == (1, 4, 32, 32, 3)
    with Video(video) as opened:
        frames = opened.frames(evaluation_frames(opened.times, config)[0].tolist())
    whole = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    whole = F.interpolate(whole, size=(40, 53), mode="bilinear", align_corners=False)
    expected = whole[:, :, 4:36, 11:43].permute(0, 2, 3, 1).numpy()
    assert np.abs(views[0] - expected).max() < 1.01


def test_a_batch_holds_clips_channels_first_and_views_behind_the_videos() -> None:
    clips = [np.full((2, 4, 6, 3), i, np.uint8) for i in range(3)]
    batch = collate_videos([Item((frames, i), 10 + i, f"k{i}", 1.0) for i, frames in enumerate(clips)])
    assert batch.clips.shape == (3, 3, 2, 4, 6)
    assert batch.clips[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    views = collate_videos([Item((np.stack([frames] * 5), 1), 0, "k", 0.0) for frames in clips])
    assert views.clips.shape == (3, 5, 3, 2, 4, 6)
    assert (len(views), views.labels.tolist(), views.weights.tolist()) == (3, [1, 1, 1], [0, 0, 0])
    assert len(batch.to("cpu")) == 3


def test_what_is_no_video_is_a_bad_sample() -> None:
    transform = VideoTransform(VideoConfig(**SMALL), train=True)
    for members in ({"cls": b"1"}, {"mp4": b"nothing", "cls": b"1"}, {"mp4": clip(4)}):
        with pytest.raises(DecodeError):
            transform(members, 0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_frames": 1}, "num_frames"),
        ({"image_size": (312, 312)}, "short_side 256 is less than image_size .* raise it to 312"),
        ({"jitter": (320, 256)}, "jitter .* must rise"),
        ({"crop": "jitter", "jitter": (200, 320)}, "begins below what image_size"),
        ({"sampling": "segments"}, "num_clips 5 with sampling 'segments'.*set num_clips=1"),
        ({"rand_augment": "rand-x"}, "no policy timm knows"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        VideoConfig(**wrong)


def test_workers_change_no_clip_and_replace_a_broken_video_in_all_its_repeats(tmp_path: Path) -> None:
    samples = [sample(clip(20 + i), i % 3) for i in range(5)]
    samples[2]["mp4"] = samples[2]["mp4"][:600]
    shards = open_shards(write_shards(tmp_path, samples, 3), required=VIDEO_MEMBERS)
    batches = []
    for workers in (0, 2):
        loader = TrainLoader(
            shards,
            VideoTransform(VideoConfig(**SMALL), train=True),
            collate_videos,
            DataConfig(num_workers=workers, max_bad_samples=1, pin_memory=False),
            seed=1,
            global_batch_size=4,
            micro_batch_size=2,
            rank=0,
            world_size=1,
            repeats=2,
        )
        batches.append(list(islice(loader.start(), 10)))
        assert loader.num_bad == 1
        loader.close()
    for alone, worked in zip(*batches, strict=True):
        assert alone.keys == worked.keys
        assert torch.equal(alone.clips, worked.clips)
        assert alone.keys[0] == alone.keys[1]
        assert not torch.equal(alone.clips[0], alone.clips[1])
    assert all("000002" not in key for batch in batches[0] for key in batch.keys)
