"""Instance masks as COCO writes them, RLE or polygons: what is wrong with one, and its pixels in a window.

A mask stays encoded until size and place of the window are known, and only the part of it that an object touches is
rasterised. The library (faster-coco-eval's form of COCO's functions) raises for some of what may be wrong, without a
hint at what it is: packing and checking look by the rules here first.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as library
from PIL import Image

Window = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Segmentation = dict[str, Any] | list[list[float]]
"""COCO's: {"size": [height, width], "counts": text or list} or a list of polygons [x0, y0, x1, y1, …]."""


def mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Return what is wrong with a mask of a picture of this size, None if nothing is."""
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        return f"segmentation {_short(segmentation)} is neither an RLE nor a list of polygons"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return f"polygon {_short(polygon)}: it needs three points or more, as a flat list of x, y"
        if not all(is_number(value) for value in polygon):
            return f"polygon {_short(polygon)}: its coordinates must be finite numbers"
        if not all(-width <= value <= 2 * width for value in polygon[0::2]) or not all(
            -height <= value <= 2 * height for value in polygon[1::2]
        ):
            return f"polygon {_short(polygon)} lies far outside the picture of {width}x{height}"
    return None


def rle_counts(text: str) -> list[int]:
    """Return the run lengths in COCO's compressed text. Raises ValueError for a text that is none."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError(f"{character!r} cannot stand there")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift  # two's complement
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))  # from the third on differences are written
            value = shift = 0
    if shift:
        raise ValueError("it ends within a number")
    return counts


def compressed(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Return one RLE of the library's kind for a mask without a problem."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return library.frPyObjects(segmentation, height, width)  # pyright: ignore[reportReturnType]
        return segmentation
    return library.merge(library.frPyObjects(segmentation, height, width))  # pyright: ignore[reportArgumentType]


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask (H, W) as an RLE that can be written as JSON."""
    rle = library.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert rle is not None
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def mask_area(segmentation: Segmentation, height: int, width: int) -> int:
    """Return the number of a mask's pixels."""
    return int(library.area(compressed(segmentation, height, width)))


def mask_box(mask: np.ndarray) -> Window | None:
    """Return the box that holds all pixels of a mask (H, W), None if it has none."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def rasterise(
    segmentation: Segmentation, source: tuple[int, int], window: Window, size: tuple[int, int], into: np.ndarray
) -> None:
    """Draw into `into` (h, w) what a window of the picture, resized to `size` (h, w), shows of a mask.

    `source` is the picture's (H, W). Polygons are drawn at the new size; of an RLE a pixel is set where half of what it
    covers is. Besides `into` this takes a picture of the object's part, and for an RLE one of H x W bytes.
    """
    height, width = size
    scale_x, scale_y = width / (window[2] - window[0]), height / (window[3] - window[1])
    if isinstance(segmentation, list):
        left, top, right, bottom = _bounds(segmentation)
    else:
        segmentation = compressed(segmentation, *source)
        left, top, right, bottom = _rle_box(segmentation)
    first_x = max(0, math.floor((left - window[0]) * scale_x) - 1)
    first_y = max(0, math.floor((top - window[1]) * scale_y) - 1)
    last_x = min(width, math.ceil((right - window[0]) * scale_x) + 1)
    last_y = min(height, math.ceil((bottom - window[1]) * scale_y) + 1)
    rows, columns = last_y - first_y, last_x - first_x
    if rows <= 0 or columns <= 0:
        return
    if isinstance(segmentation, list):
        moved = [_moved(polygon, window, (scale_x, scale_y), (first_x, first_y)) for polygon in segmentation]
        part = library.decode(compressed(moved, rows, columns)).astype(bool)
    else:
        pixels = library.decode(segmentation)
        # In whole pixels around the part: resizing does not look further.
        x0 = window[0] + first_x / scale_x
        y0 = window[1] + first_y / scale_y
        x1, y1 = min(x0 + columns / scale_x, window[2]), min(y0 + rows / scale_y, window[3])
        if (scale_x, scale_y) == (1, 1) and x0 == int(x0) and y0 == int(y0):
            part = pixels[int(y0) : int(y0) + rows, int(x0) : int(x0) + columns].astype(bool)
        else:
            image = Image.fromarray(np.ascontiguousarray(pixels) * 255)
            resized = image.resize((columns, rows), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
            part = np.asarray(resized) > 127
    into[first_y:last_y, first_x:last_x] = part


def _rle_problem(rle: dict[str, Any], height: int, width: int) -> str | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        return f"RLE of size {_short(size)}, the picture is [{height}, {width}] (height, width)"
    try:
        runs = rle_counts(counts) if isinstance(counts, str) else counts
    except ValueError as error:
        return f"broken RLE {_short(counts)}: {error}"
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return f"broken RLE {_short(counts)}: runs must be whole numbers of 0 or more"
    if sum(runs) != height * width:
        return f"broken RLE {_short(counts)}: its runs make {sum(runs)} pixels, the picture has {height * width}"
    if not sum(runs[1::2]):
        return f"RLE {_short(counts)} has no pixel"
    return None


def _rle_box(rle: dict[str, Any]) -> Window:
    x, y, width, height = library.toBbox(rle).tolist()
    return x, y, x + width, y + height


def _bounds(polygons: Sequence[Sequence[float]]) -> Window:
    xs = [value for polygon in polygons for value in polygon[0::2]]
    ys = [value for polygon in polygons for value in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def _moved(polygon: Sequence[float], window: Window, scale: tuple[float, float], first: tuple[int, int]) -> list[float]:
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return ((points - window[:2]) * scale - first).reshape(-1).tolist()


def is_number(value: Any) -> bool:
    """Tell whether something is a finite number; JSON has whole ones beyond every float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
