"""Masks: what is broken is found before the library sees it, and a window of a mask is what resizing it would give."""

import numpy as np
import pytest
from faster_coco_eval.core import mask as library
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.masks import encode, mask_area, mask_box, mask_problem, rasterise, rle_counts
from tests.data_pipeline.scenes import blob, box_polygon

QUICK = settings(max_examples=40, deadline=None, database=None, derandomize=True)


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_runs_read_from_the_compressed_text_are_the_masks(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    rle = encode(mask)
    flat = mask.T.reshape(-1)
    runs, last = [0], False
    for pixel in flat:
        if pixel != last:
            runs.append(0)
            last = bool(pixel)
        runs[-1] += 1
    assert rle_counts(rle["counts"]) == runs
    assert (mask_problem(rle, height, width) is None) == bool(mask.any())
    assert mask_area(rle, height, width) == mask.sum()
    assert (library.decode(library.frPyObjects({"size": rle["size"], "counts": runs}, height, width)) == mask).all()


GOOD = encode(np.eye(6, 8, dtype=bool))


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ({"size": [8, 6], "counts": GOOD["counts"]}, r"RLE of size \[8, 6\], the picture is \[6, 8\]"),
        ({"size": [6, 8], "counts": GOOD["counts"][:-1]}, "broken RLE"),
        ({"size": [6, 8], "counts": GOOD["counts"][:-2] + "é"}, "broken RLE .* 'é' cannot stand there"),
        ({"size": [6, 8], "counts": "ooooooooooo"}, "broken RLE"),
        ({"size": [6, 8], "counts": [10, 20]}, "its runs make 30 pixels, the picture has 48"),
        ({"size": [6, 8], "counts": [50, -2]}, "runs must be whole numbers of 0 or more"),
        ({"size": [6, 8], "counts": [48]}, "has no pixel"),
        ({"size": [6, 8], "counts": None}, "broken RLE None"),
        ({"size": [6, 8]}, "broken RLE None"),
        ({}, "RLE of size None"),
        ([], r"segmentation \[\] is neither an RLE nor a list of polygons"),
        ("x", "is neither an RLE nor a list of polygons"),
        ([[1, 2, 3, 4]], "it needs three points or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "it needs three points or more"),
        ([1, 2, 3, 4, 5, 6], "polygon 1: it needs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite numbers"),
        ([[1, 2, 3, "4", 5, 6]], "finite numbers"),
        ([[1, 2, 3, 4, 5e9, 6]], "lies far outside the picture of 8x6"),
    ],
)
def test_every_kind_of_broken_mask_is_named(segmentation: object, told: str) -> None:
    problem = mask_problem(segmentation, 6, 8)
    assert problem is not None
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(problem)


def drawn(
    segmentation: object, source: tuple[int, int], window: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    into = np.zeros(size, bool)
    rasterise(segmentation, source, window, size, into)  # pyright: ignore[reportArgumentType]
    return into


def test_a_window_at_its_own_size_is_a_part_of_the_mask_pixel_for_pixel() -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.3
    rle = encode(mask)
    assert (drawn(rle, (30, 40), (0, 0, 40, 30), (30, 40)) == mask).all()
    assert (drawn(rle, (30, 40), (7, 3, 27, 18), (15, 20)) == mask[3:18, 7:27]).all()


@QUICK
@given(st.integers(0, 10**6), st.floats(0.3, 4), st.booleans())
def test_drawing_the_part_is_drawing_the_whole(seed: int, scale: float, cropped: bool) -> None:
    """An object's own rectangle is all that is drawn; beyond it nothing may be missing."""
    mask = blob(40, 50, seed)
    window = (11.25, 6.5, 45.0, 36.75) if cropped else (0.0, 0.0, 50.0, 40.0)
    size = max(1, round((window[3] - window[1]) * scale)), max(1, round((window[2] - window[0]) * scale))
    found = drawn(encode(mask), (40, 50), window, size)
    y = window[1] + (np.arange(size[0]) + 0.5) * (window[3] - window[1]) / size[0]
    x = window[0] + (np.arange(size[1]) + 0.5) * (window[2] - window[0]) / size[1]
    nearest = mask[np.ix_(y.astype(int).clip(0, 39), x.astype(int).clip(0, 49))]
    edge = np.abs(np.diff(nearest.astype(int), axis=0)).sum() + np.abs(np.diff(nearest.astype(int), axis=1)).sum()
    assert (found != nearest).sum() <= 0.6 * edge * max(scale, 1) + 2  # they may differ along the outline alone


@QUICK
@given(st.integers(2, 20), st.integers(2, 20), st.integers(5, 25), st.integers(5, 18), st.floats(0.5, 3), st.booleans())
def test_polygons_and_rle_of_the_same_outline_agree(
    left: int, top: int, width: int, height: int, scale: float, cropped: bool
) -> None:
    mask = np.zeros((40, 50), bool)
    mask[top : top + height, left : left + width] = True
    window = (5.0, 4.0, 35.0, 28.0) if cropped else (0.0, 0.0, 50.0, 40.0)
    size = round((window[3] - window[1]) * scale), round((window[2] - window[0]) * scale)
    polygon = drawn([box_polygon(left, top, width, height)], (40, 50), window, size)
    rle = drawn(encode(mask), (40, 50), window, size)
    ours, theirs = mask_box(polygon), mask_box(rle)
    if ours is None or theirs is None:
        assert polygon.sum() + rle.sum() <= sum(size)
        return
    assert np.abs(np.subtract(ours, theirs)).max() <= 1
    outline = 2 * (ours[2] - ours[0] + ours[3] - ours[1])
    assert (polygon != rle).sum() <= outline, "they differ along the outline alone"


def test_several_polygons_are_one_mask() -> None:
    both = [box_polygon(2, 2, 10, 10), box_polygon(20, 5, 8, 12)]
    assert mask_area(both, 30, 40) == 100 + 96
    assert drawn(both, (30, 40), (0, 0, 40, 30), (30, 40)).sum() == 196
