"""RandAugment on arrays is timm's on PIL pictures: each operation within one level, the same draws, the same holes."""

import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm

from data_pipeline import augment_ops as ours
from data_pipeline.augment import RandAugment, timm_rand_augment
from tests.data_pipeline.pictures import pixels

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def photo(seed: int, height: int = 61, width: int = 83) -> np.ndarray:
    """Return a smooth picture with noise and hard edges, and a channel that does not use all levels."""
    draws = np.random.default_rng(seed)
    picture = pixels(seed, height, width).astype(np.int64)
    picture += draws.integers(-20, 21, picture.shape)
    picture[height // 3 : height // 2, width // 4 : width // 2] = draws.integers(0, 256, 3)
    picture[..., 1] = 40 + picture[..., 1] // 2
    return picture.clip(0, 255).astype(np.uint8)


TABLES: dict[str, tuple[Any, Any, tuple[float, ...]]] = {
    "auto_contrast": (timm.auto_contrast, ours.auto_contrast, ()),
    "equalize": (timm.equalize, ours.equalize, ()),
    "invert": (timm.invert, ours.invert, ()),
    "posterize": (timm.posterize, ours.posterize, (1, 2, 4, 7, 8)),
    "solarize": (timm.solarize, ours.solarize, (0, 1, 77, 128, 255, 256)),
    "solarize_add": (timm.solarize_add, ours.solarize_add, (0, 1, 55, 110)),
    "brightness": (timm.brightness, ours.brightness, (0.1, 0.5, 0.97, 1.0, 1.33, 1.9)),
    "contrast": (timm.contrast, ours.contrast, (0.1, 0.5, 0.97, 1.0, 1.33, 1.9)),
}
FILTERS: dict[str, tuple[Any, Any, tuple[float, ...]]] = {
    "color": (timm.color, ours.color, (0.1, 0.5, 0.97, 1.0, 1.33, 1.9)),
    "sharpness": (timm.sharpness, ours.sharpness, (0.1, 0.5, 0.97, 1.0, 1.33, 1.9)),
}
MOVES: dict[str, tuple[Any, Any, tuple[float, ...]]] = {
    "shear_x": (timm.shear_x, ours.shear_x, (-2.5, -0.3, -0.01, 0.0, 0.17, 0.3, 2.5)),
    "shear_y": (timm.shear_y, ours.shear_y, (-2.5, -0.3, -0.01, 0.0, 0.17, 0.3, 2.5)),
    "translate_x": (timm.translate_x_rel, ours.translate_x, (-1.2, -0.45, -0.01, 0.0, 0.1, 0.333, 1.2)),
    "translate_y": (timm.translate_y_rel, ours.translate_y, (-1.2, -0.45, -0.01, 0.0, 0.1, 0.333, 1.2)),
}


def both(name: tuple[Any, Any, tuple[float, ...]], picture: np.ndarray, *argument: float, **options: Any) -> Any:
    pil, arrays, _ = name
    expected = np.asarray(pil(Image.fromarray(picture), *argument, **options)).astype(int)
    return expected, arrays(ours.Pixels(picture), *argument, **options).array().astype(int)


PICTURES: list[Callable[[], np.ndarray]] = [
    partial(photo, 1),
    partial(photo, 2, 64, 32),
    partial(photo, 3, 7, 9),
    lambda: np.full((20, 30, 3), 200, np.uint8),
    lambda: (np.arange(64 * 64 * 3) % 256).astype(np.uint8).reshape(64, 64, 3),
]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("picture", PICTURES)
def test_operations_on_levels_give_pils_pixels(name: str, picture: Callable[[], np.ndarray]) -> None:
    for argument in [(value,) for value in TABLES[name][2]] or [()]:
        expected, got = both(TABLES[name], picture(), *argument)
        assert np.array_equal(got, expected), argument


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("picture", PICTURES)
def test_operations_on_pixels_are_within_one_level_of_pils(name: str, picture: Callable[[], np.ndarray]) -> None:
    for argument in FILTERS[name][2]:
        expected, got = both(FILTERS[name], picture(), argument)
        assert np.abs(got - expected).max() <= 1, argument
        assert (got != expected).mean() < 0.02, argument


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
def test_moves_are_within_one_level_of_pils_with_the_same_holes(
    name: str, picture: Callable[[], np.ndarray], resample: Image.Resampling
) -> None:
    for argument in MOVES[name][2]:
        expected, got = both(MOVES[name], picture(), argument, fillcolor=FILL, resample=resample)
        assert np.abs(got - expected).max() <= 1, argument
        assert (got != expected).mean() < 0.05, argument  # where the exact value is a whole level


def test_posterizing_to_no_bits_is_black() -> None:
    assert not ours.posterize(ours.Pixels(photo(1)), 0).array().any()


def test_operations_in_a_row_see_what_those_before_them_did() -> None:
    picture = photo(4)
    arrays = ours.Pixels(picture)
    pil = Image.fromarray(picture)
    for name, argument in (
        ("solarize", (90,)), ("equalize", ()), ("brightness", (0.6,)), ("auto_contrast", ()), ("invert", ()),
        ("contrast", (1.4,)), ("posterize", (4,)), ("equalize", ()), ("solarize_add", (30,)),
    ):  # fmt: skip
        pil, arrays = TABLES[name][0](pil, *argument), TABLES[name][1](arrays, *argument)
    assert np.array_equal(arrays.array(), np.asarray(pil))
    assert np.array_equal(picture, photo(4)), "the picture that was given is left alone"


@pytest.mark.parametrize(
    "policy", ["rand-m9-n6-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1", "rand-m10-n2-p1", "rand-m9-t3a"]
)
def test_rand_augment_draws_what_timm_draws_and_comes_out_the_same(policy: str) -> None:
    size = (64, 96)
    fast = pickle.loads(pickle.dumps(RandAugment(policy, size, MEAN, BICUBIC)))
    exact = RandAugment(policy, size, MEAN, BICUBIC, exact=True)
    usual = timm_rand_augment(policy, size, MEAN, BICUBIC)
    distances = []
    for seed in range(60):
        picture = photo(seed, *size)
        random.seed(seed)
        np.random.seed(seed)
        expected = np.asarray(usual(Image.fromarray(picture)))
        assert np.array_equal(exact(picture, seed), expected)
        distances.append(np.abs(fast(picture, seed).astype(int) - expected))
    # A level can become many where an operation has a threshold (posterize, solarize), in few pixels of few pictures.
    assert sum(distance.max() <= 3 for distance in distances) > 50
    assert np.mean(distances) < 0.05
    assert np.mean([(distance > 3).mean() for distance in distances]) < 1e-3
