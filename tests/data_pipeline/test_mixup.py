"""Device augmentation: timm's erasing and mixing, a pure function of (batch, seed)."""

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from data_pipeline.batch import ImageBatch
from data_pipeline.image import ImageConfig
from data_pipeline.mixup import DeviceAugment, check_micro_batch, normalize, normalize_pixels
from data_pipeline.synthetic import SyntheticBatches
from data_pipeline.video import VideoConfig

NO_MIXING = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}


def batch_of(size: int, seed: int = 0) -> ImageBatch:
    return next(iter(SyntheticBatches((32, 40), 7, size, seed=seed)))


def test_the_same_seed_gives_the_same_batch_and_no_generator_is_moved() -> None:
    batch, augment = batch_of(6), DeviceAugment(ImageConfig(random_erasing_prob=1.0), 7)
    original = batch.images.clone()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    untouched = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = [augment(batch, seed) for seed in range(8)]
    assert (random.random(), np.random.rand(), torch.rand(1)) == untouched
    assert torch.equal(batch.images, original)
    for seed in reversed(range(8)):
        images, targets = augment(batch, seed)
        assert torch.equal(images, first[seed][0])
        assert torch.equal(targets, first[seed][1])
    assert len({images.numpy().tobytes() for images, _ in first}) == 8


@pytest.mark.parametrize("seed", range(6))
def test_erasing_and_mixing_are_timms(seed: int) -> None:
    config, batch = ImageConfig(random_erasing_prob=0.5), batch_of(8)
    images, targets = DeviceAugment(config, 7)(batch, seed)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    expected = RandomErasing(0.5, mode="pixel", device="cpu")(normalize(batch, config))
    mixup = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=7)
    expected, expected_targets = mixup(expected, batch.labels)
    assert torch.equal(images, expected)
    assert torch.equal(targets, expected_targets)


def test_both_mixup_and_cutmix_occur() -> None:
    config, batch = ImageConfig(random_erasing_prob=0.0), batch_of(4)
    plain = normalize(batch, config)
    kept = [bool((DeviceAugment(config, 7)(batch, seed)[0] == plain).float().mean() > 0.02) for seed in range(40)]
    assert 8 < sum(kept) < 32


def test_in_an_odd_batch_the_middle_picture_and_its_target_stay() -> None:
    config = ImageConfig(random_erasing_prob=0.0, label_smoothing=0.0)
    batch = batch_of(5)
    plain = normalize(batch, config)
    for seed in range(10):
        images, targets = DeviceAugment(config, 7)(batch, seed)
        assert torch.allclose(images[2], plain[2], atol=1e-6)
        assert torch.allclose(targets[2], torch.eye(7)[batch.labels[2]])
        assert not torch.allclose(images[0], plain[0])
        assert torch.allclose(targets.sum(1), torch.ones(5))
        weight = targets[0, batch.labels[0]] if batch.labels[0] != batch.labels[4] else None
        if weight is not None:
            assert torch.isclose(targets[4, batch.labels[4]], weight)


def test_without_mixing_targets_are_smoothed_one_hot() -> None:
    batch = batch_of(3)
    images, targets = DeviceAugment(ImageConfig(random_erasing_prob=0.0, **NO_MIXING), 7)(batch, 0, torch.bfloat16)
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, normalize(batch, ImageConfig(), torch.bfloat16))
    expected = torch.full((3, 7), 0.1 / 7)
    expected[torch.arange(3), batch.labels] += 0.9
    assert torch.allclose(targets, expected)


def test_erasing_fills_rectangles_of_the_published_sizes_with_unit_noise() -> None:
    config = ImageConfig(random_erasing_prob=1.0, image_size=(64, 64), **NO_MIXING)
    batch = next(iter(SyntheticBatches((64, 64), 3, 40)))
    changed = (DeviceAugment(config, 3)(batch, 0)[0] != normalize(batch, config)).all(1)
    areas = changed.float().mean((1, 2))
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    noise = DeviceAugment(config, 3)(batch, 0)[0].permute(0, 2, 3, 1)[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_images_stay_channels_last() -> None:
    images, _ = DeviceAugment(ImageConfig(random_erasing_prob=1.0), 7)(batch_of(4), 0)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_micro_batch_of_one_cannot_be_mixed() -> None:
    check_micro_batch(ImageConfig(), 2)
    check_micro_batch(ImageConfig(**NO_MIXING), 1)
    check_micro_batch(ImageConfig(mix_prob=0.0), 1)
    with pytest.raises(ValueError, match=r"micro_batch_size 1 with mixup or cutmix on.*Raise micro_batch_size"):
        check_micro_batch(ImageConfig(), 1)


@pytest.mark.parametrize("seed", range(4))
def test_all_frames_of_a_clip_share_the_rectangle_and_the_weight(seed: int) -> None:
    """Each frame is erased and mixed as timm would a picture, at one place for all of them: SlowFast's "cube"."""
    batch = next(iter(SyntheticBatches((5, 32, 40), 7, 6)))
    clips, targets = DeviceAugment(VideoConfig(random_erasing_prob=0.5), 7)(batch, seed)
    assert clips.shape == (6, 3, 5, 32, 40)
    assert clips.is_contiguous()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    tall = normalize(batch, VideoConfig()).reshape(6, 15, 32, 40)  # timm's functions, on pictures of 15 channels
    expected = RandomErasing(0.5, mode="pixel", device="cpu")(tall)
    mixup = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=7)
    expected, expected_targets = mixup(expected, batch.labels)
    assert torch.equal(clips, expected.view(6, 3, 5, 32, 40))
    assert torch.equal(targets, expected_targets)


def test_erasing_a_clip_takes_one_rectangle_through_time_and_noise_that_changes() -> None:
    batch = next(iter(SyntheticBatches((4, 32, 32), 7, 8)))
    config = VideoConfig(random_erasing_prob=1.0, **NO_MIXING)
    plain, clips = normalize(batch, config), DeviceAugment(config, 7)(batch, 0)[0]
    changed = (clips != plain).all(1)
    assert changed.any((1, 2, 3)).all()
    assert (changed == changed[:, :1]).all()
    assert (clips[:, :, 0] != clips[:, :, 1]).any(1)[changed[:, 0]].all()


def test_clips_are_normalised_channel_by_channel() -> None:
    batch = next(iter(SyntheticBatches((2, 8, 8), 7, 3)))
    config = VideoConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        expected = (batch.clips[:, channel].float() / 255 - mean) / std
        assert torch.allclose(normalize(batch, config)[:, channel], expected)
    views = normalize_pixels(batch.clips[None].expand(2, -1, -1, -1, -1, -1).flatten(0, 1), config)
    assert torch.equal(views[3:], normalize(batch, config))


@pytest.mark.gpu
def test_on_a_gpu_the_draws_are_those_of_the_cpu_and_its_generator_is_not_moved() -> None:
    batch, config = batch_of(8), ImageConfig(random_erasing_prob=0.0)
    state = torch.cuda.get_rng_state()
    for seed in range(4):
        on_cpu, on_gpu = DeviceAugment(config, 7)(batch, seed), DeviceAugment(config, 7)(batch.to("cuda"), seed)
        assert torch.allclose(on_cpu[0], on_gpu[0].cpu(), atol=1e-6)
        assert torch.allclose(on_cpu[1], on_gpu[1].cpu())
    erased = DeviceAugment(ImageConfig(random_erasing_prob=1.0), 7)
    assert torch.equal(erased(batch.to("cuda"), 3)[0], erased(batch.to("cuda"), 3)[0])
    assert torch.equal(torch.cuda.get_rng_state(), state)
