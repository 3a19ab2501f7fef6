"""Image transforms: evaluation equals timm's bit for bit, training follows the published recipe and its seed alone."""

import io
import math
import pickle
import random
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from data_pipeline.image import ImageConfig, ImageTransform, collate_images, rand_augment, random_crop_box
from data_pipeline.mixup import normalize
from data_pipeline.order import derive_seed
from data_pipeline.reads import Item
from tests.data_pipeline.pictures import encoded, pixels

PLAIN = {"rand_augment": None, "hflip_prob": 0.0}


def sample(data: bytes, label: int = 3) -> dict[str, bytes]:
    return {"jpg": data, "cls": str(label).encode()}


def transformed(data: bytes, train: bool, seed: int = 0, **config: object) -> np.ndarray:
    return ImageTransform(ImageConfig(**config), train)(sample(data), seed)[0]


@pytest.mark.parametrize("decoder", ["fast", "pil"])
@pytest.mark.parametrize("shape", [(300, 400), (401, 303), (224, 224), (100, 97), (60, 500)])
@pytest.mark.parametrize(
    ("image_size", "crop_pct"), [((224, 224), 0.875), ((64, 64), 0.95), ((96, 64), 0.875), ((63, 111), 1.0)]
)
def test_evaluation_equals_timms_transform_bit_for_bit(
    decoder: str, shape: tuple[int, int], image_size: tuple[int, int], crop_pct: float
) -> None:
    data = encoded(shape[0], *shape)
    config = ImageConfig(image_size=image_size, crop_pct=crop_pct, decoder=decoder)
    timm = create_transform((3, *image_size), interpolation="bicubic", crop_pct=crop_pct)
    expected = timm(Image.open(io.BytesIO(data)).convert("RGB"))
    ours = ImageTransform(config, train=False)(sample(data), 0)
    batch = collate_images([Item(ours, 0, "k", 1.0)])
    assert torch.equal(normalize(batch, config)[0], expected)


def test_full_resize_equals_torchvisions_resize_of_the_whole_picture() -> None:
    data = encoded(1, 120, 300)
    expected = transforms.Resize((64, 96), transforms.InterpolationMode.BICUBIC)(Image.open(io.BytesIO(data)))
    assert np.array_equal(transformed(data, False, image_size=(64, 96), full_resize=True), np.asarray(expected))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_fast_training_crop_is_close_to_pils(interpolation: str) -> None:
    for seed, shape in enumerate([(300, 400), (900, 1200), (40, 50), (64, 300)]):
        data = encoded(seed, *shape, quality=95, subsampling=0)
        options = {"image_size": (64, 64), "interpolation": interpolation, **PLAIN}
        fast = transformed(data, True, seed, **options)
        pil = transformed(data, True, seed, decoder="pil", **options)
        assert np.abs(fast.astype(int) - pil.astype(int)).mean() < 2.5, shape  # of the quick inverse DCT
        png = encoded(seed, *shape, kind="PNG")
        same = transformed(png, True, seed, decoder="pil", **options).astype(int) - transformed(
            png, True, seed, **options
        )
        assert np.abs(same).max() <= 2, shape


def test_training_is_a_pure_function_of_bytes_and_seed_and_leaves_the_global_generators_alone() -> None:
    data = encoded(2, 80, 90)
    transform = ImageTransform(ImageConfig(image_size=(32, 48)), train=True)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    untouched = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = [transform(sample(data), seed)[0] for seed in range(20)]
    assert (random.random(), np.random.rand(), torch.rand(1)) == untouched
    again = pickle.loads(pickle.dumps(transform))
    assert all(np.array_equal(again(sample(data), seed)[0], first[seed]) for seed in reversed(range(20)))
    assert len({picture.tobytes() for picture in first}) == 20
    assert all(picture.shape == (32, 48, 3) and picture.dtype == np.uint8 for picture in first)


def test_rand_augment_is_timms_with_the_published_parameters() -> None:
    data, seed = encoded(3, 80, 80), 11
    plain = transformed(data, True, seed, image_size=(64, 64), decoder="pil", rand_augment=None)
    ours = transformed(data, True, seed, image_size=(64, 64), decoder="pil")
    timm = rand_augment_transform(
        "rand-m9-n6-mstd0.5-inc1",
        {"translate_const": 28, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC},
    )
    inner = derive_seed(seed, "rand_augment")
    random.seed(inner)
    np.random.seed(inner % 2**32)
    assert np.array_equal(ours, np.asarray(timm(Image.fromarray(plain))))
    assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("decoder", ["fast", "pil"])
def test_posterizing_to_no_bits_gives_black_and_never_stops_training(decoder: Literal["fast", "pil"]) -> None:
    # level 10 keeps 0 bits, which Pillow 13 refuses
    augment = rand_augment(ImageConfig(rand_augment="rand-m10-n1-p1-inc1", decoder=decoder))
    assert augment is not None
    assert sum(not augment(pixels(5, 32, 32), seed).any() for seed in range(150)) > 0


def test_mirroring_happens_with_its_probability_and_mirrors() -> None:
    data = encoded(4, 64, 64)
    never = [transformed(data, True, seed, image_size=(32, 32), **PLAIN) for seed in range(60)]
    maybe = [
        transformed(data, True, seed, image_size=(32, 32), rand_augment=None, hflip_prob=0.5) for seed in range(60)
    ]
    mirrored = [np.array_equal(m, n[:, ::-1]) for m, n in zip(maybe, never, strict=True)]
    same = [np.array_equal(m, n) for m, n in zip(maybe, never, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 15 < sum(mirrored) < 45


def test_crops_have_the_distribution_of_torchvisions() -> None:
    draws = random.Random(0)
    boxes = np.array([random_crop_box(300, 400, (0.08, 1.0), (3 / 4, 4 / 3), draws) for _ in range(3000)])
    torch.manual_seed(0)
    picture = torch.empty(3, 300, 400)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 300).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 400).all()
    assert np.abs(boxes.mean(0) - theirs.mean(0)).max() < 6
    assert np.abs(boxes.std(0) - theirs.std(0)).max() < 6


def test_a_picture_too_long_for_any_crop_gives_its_centre() -> None:
    box = random_crop_box(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(0))
    assert box == (0, (1000 - 13) // 2, 10, 13)
    assert math.isclose(13 / 10, 4 / 3, rel_tol=0.05)


def test_a_batch_is_channels_last_and_keeps_what_belongs_to_each_sample() -> None:
    items = [Item((np.full((4, 6, 3), i, np.uint8), i + 5), 10 + i, f"s.tar/{i}", 1.0) for i in range(3)]
    batch = collate_images([*items, Item((np.zeros((4, 6, 3), np.uint8), 0), -1, "padding", 0.0)])
    assert batch.images.shape == (4, 3, 4, 6)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0]
    assert batch.labels.tolist() == [5, 6, 7, 0]
    assert batch.sample_ids.tolist() == [10, 11, 12, -1]
    assert batch.weights.tolist() == [1, 1, 1, 0]
    assert batch.keys == ("s.tar/0", "s.tar/1", "s.tar/2", "padding")
    assert len(batch.to("cpu")) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.5, 0.1)},
        {"crop_ratio": (0, 1)},
        {"image_size": (0, 224)},
        {"std": (1, 0, 1)},
        {"crop_pct": 1.5},
        {"hflip_prob": 2},
        {"crop_size": 3},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ImageConfig(**wrong)


@pytest.mark.parametrize("policy", ["rand-x9", "original", "rand-tnosuch"])
def test_an_unknown_rand_augment_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValidationError, match=f"rand_augment '{policy}' is no policy timm knows"):
        ImageConfig(rand_augment=policy)
