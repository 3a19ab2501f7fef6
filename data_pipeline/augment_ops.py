"""RandAugment's operations on arrays: PIL's pixels, but for at most one level an operation, in less of its time.

Operations that change each channel's levels by themselves are tables of 256; several in a row become one table, and a
histogram goes through tables without looking at a pixel. Shearing and shifting move rows (columns) only, so that
bicubic resampling is one filter of four taps along them; rotation is left to PIL. The formulas are those of PIL's C
code; where it truncates, so do we.
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

_LEVELS = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_GREY = np.array([[19595], [38470], [7471]], np.float32)
_DOWN = 0.4999
"""OpenCV rounds, PIL truncates: what is added before."""


class Pixels:
    """A picture (H, W, 3) uint8 on its way through operations, with tables of levels that are still to be applied."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._table: np.ndarray | None = None  # (256, 3), still to be applied
        self._counts: np.ndarray | None = None  # (256, 3): histogram of the array, without the table

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as PIL says it."""
        return self._array.shape[1], self._array.shape[0]

    def array(self) -> np.ndarray:
        """Return the picture with all tables applied."""
        if self._table is not None:
            self._array = cv2.LUT(self._array, self._table.reshape(256, 1, 3))
            self._table = self._counts = None
        return self._array

    def histogram(self) -> np.ndarray:
        """Return how many pixels of each channel have each level (256, 3)."""
        if self._counts is None:
            channels = (cv2.calcHist([self._array], [channel], None, [256], [0, 256]) for channel in range(3))
            self._counts = np.stack([one.reshape(256) for one in channels], axis=1).astype(np.int64)
        if self._table is None:
            return self._counts
        counts = np.zeros((256, 3), np.int64)
        for channel in range(3):
            counts[:, channel] = np.bincount(self._table[:, channel], self._counts[:, channel], minlength=256)
        return counts

    def mapped(self, table: np.ndarray) -> "Pixels":
        """Return the picture with every level replaced by table[level]: (256,) or, by channel, (256, 3), uint8."""
        table = np.broadcast_to(table.reshape(256, -1), (256, 3))
        after = Pixels(self._array)
        after._counts = self._counts
        before = self._table
        after._table = np.ascontiguousarray(table) if before is None else np.take_along_axis(table, before, axis=0)
        return after


def auto_contrast(pixels: Pixels, **_: Any) -> Pixels:
    """Stretch each channel's levels to 0 … 255."""
    counts = pixels.histogram() > 0
    low, high = counts.argmax(axis=0), 255 - counts[::-1].argmax(axis=0)
    table = np.empty((256, 3), np.uint8)
    for channel, (lo, hi) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        scale = 255.0 / (hi - lo) if hi > lo else 1.0
        stretched = (_LEVELS * scale + (-lo * scale if hi > lo else 0)).astype(np.int64)
        table[:, channel] = np.clip(stretched, 0, 255)
    return pixels.mapped(table)


def equalize(pixels: Pixels, **_: Any) -> Pixels:
    """Spread each channel's levels evenly."""
    counts = pixels.histogram()
    table = np.empty((256, 3), np.uint8)
    for channel in range(3):
        histogram = counts[:, channel]
        used = histogram[histogram > 0]
        step = int(used.sum() - used[-1]) // 255
        if len(used) <= 1 or step == 0:
            table[:, channel] = _LEVELS
        else:
            before = np.concatenate([[0], np.cumsum(histogram)[:-1]])
            table[:, channel] = np.minimum((step // 2 + before) // step, 255)
    return pixels.mapped(table)


def invert(pixels: Pixels, **_: Any) -> Pixels:
    """Turn levels round."""
    return pixels.mapped((255 - _LEVELS).astype(np.uint8))


def posterize(pixels: Pixels, bits_to_keep: int, **_: Any) -> Pixels:
    """Keep the upper bits; none of them is black, as in Pillow before 13."""
    if bits_to_keep >= 8:
        return pixels
    return pixels.mapped((_LEVELS & (255 << (8 - bits_to_keep)) & 255).astype(np.uint8))


def solarize(pixels: Pixels, thresh: int, **_: Any) -> Pixels:
    """Invert the levels from a threshold on."""
    return pixels.mapped(np.where(thresh > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def solarize_add(pixels: Pixels, add: int, thresh: int = 128, **_: Any) -> Pixels:
    """Add to the levels below a threshold."""
    return pixels.mapped(np.where(thresh > _LEVELS, np.minimum(255, _LEVELS + add), _LEVELS).astype(np.uint8))


def brightness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with black."""
    return pixels.mapped(_blended(np.zeros(256), _LEVELS, factor))


def contrast(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the mean grey."""
    mean = int(float(_grey(pixels.array()).mean(dtype=np.float64)) + 0.5)
    return pixels.mapped(_blended(np.full(256, mean), _LEVELS, factor))


def color(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the picture in grey."""
    array = pixels.array()
    grey = cv2.cvtColor(_grey(array).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    return Pixels(_blend(grey, array, factor))


def sharpness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the smoothed picture, whose margin PIL leaves as it is."""
    array = pixels.array()
    smooth = array.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(array, -1, _SMOOTH)[1:-1, 1:-1]
    return Pixels(_blend(smooth, array, factor))


def shear_x(pixels: Pixels, factor: float, **options: Any) -> Pixels:
    """Shift each row in proportion to its height."""
    return Pixels(_sheared(pixels.array(), factor, options))


def shear_y(pixels: Pixels, factor: float, **options: Any) -> Pixels:
    """Shift each column in proportion to its place."""
    return Pixels(cv2.transpose(_sheared(cv2.transpose(pixels.array()), factor, options)))


def translate_x(pixels: Pixels, pct: float, **options: Any) -> Pixels:
    """Shift all by a part of the width."""
    array = pixels.array()
    return Pixels(_moved(array, pct * array.shape[1], 1, options))


def translate_y(pixels: Pixels, pct: float, **options: Any) -> Pixels:
    """Shift all by a part of the height."""
    array = pixels.array()
    return Pixels(_moved(array, pct * array.shape[0], 0, options))


def by_pil(operation: Callable[..., Image.Image], pixels: Pixels, *arguments: Any, **options: Any) -> Pixels:
    """Apply an operation on PIL pictures."""
    return Pixels(np.asarray(operation(Image.fromarray(pixels.array()), *arguments, **options)))


def _grey(array: np.ndarray) -> np.ndarray:
    """Return PIL's L of every pixel (H, W) float32; sums below 2^24 are exact in float32, whatever their order."""
    sums = cv2.transform(array.astype(np.float32), _GREY.T)
    return np.floor((sums + 0x8000) * np.float32(1 / 65536))


def _blended(start: np.ndarray, levels: np.ndarray, factor: float) -> np.ndarray:
    """Return Image.blend of levels, a table."""
    mixed = start.astype(np.float32) + np.float32(factor) * (levels - start).astype(np.float32)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _blend(start: np.ndarray, array: np.ndarray, factor: float) -> np.ndarray:
    """Return Image.blend of pictures."""
    return cv2.addWeighted(array, factor, start, 1 - factor, -_DOWN)


def _weights(part: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the weights of the pixels -1, 0, 1 and 2 for a point between 0 and 1; bicubic is PIL's, with a = -1."""
    t = part
    if options["resample"] == Image.Resampling.BILINEAR:
        return 0 * t, 1 - t, t, 0 * t
    return t * (-1 + t * (2 - t)), 1 + t * t * (t - 2), t * (1 + t * (1 - t)), t * t * (t - 1)


def _moved(array: np.ndarray, shift: float, axis: int, options: dict[str, Any]) -> np.ndarray:
    """Return a picture moved by `shift` pixels against an axis; whose centre comes from outside is a hole."""
    length = array.shape[axis]
    whole = math.floor(shift)
    taps = np.array(_weights(shift - whole, options), np.float32)
    # One pixel more in front: a centre may lie before that of the first pixel and yet inside.
    front = (1, 0, 0, 0) if axis == 0 else (0, 0, 1, 0)
    padded = cv2.copyMakeBorder(array, *front, cv2.BORDER_REPLICATE)
    kernel, anchor = (taps[:, None], (0, 1)) if axis == 0 else (taps[None], (1, 0))
    filtered = cv2.filter2D(padded, -1, kernel, anchor=anchor, delta=-_DOWN, borderType=cv2.BORDER_REPLICATE)
    result = np.empty_like(array)
    result[:] = options["fillcolor"]
    first, end = max(0, math.ceil(-0.5 - shift)), min(length, math.ceil(length - 0.5 - shift))
    if first < end:
        here, there = slice(first, end), slice(first + whole + 1, end + whole + 1)
        if axis == 0:
            result[here] = filtered[there]
        else:
            result[:, here] = filtered[:, there]
    return result


def _sheared(array: np.ndarray, factor: float, options: dict[str, Any]) -> np.ndarray:
    """Return row y moved to the left by (y + 1/2) · factor pixels."""
    height, width, channels = array.shape
    shifts = (np.arange(height) + 0.5) * factor
    whole = np.floor(shifts)
    weights = _weights((shifts - whole)[:, None].astype(np.float32), options)
    # As far as any row is moved, and no further than to where it is all hole.
    reach = min(width, math.ceil(abs(shifts[-1]))) + 3
    padded = cv2.copyMakeBorder(array, 0, 0, reach + 1, reach + 3, cv2.BORDER_REPLICATE)
    rows = np.lib.stride_tricks.sliding_window_view(padded.reshape(height, -1), (width + 3) * channels, axis=1)
    starts = (np.clip(whole, -reach, reach).astype(np.int64) + reach) * channels
    taps = rows[np.arange(height), starts].astype(np.float32)
    four = (height, 4, width * channels), (taps.strides[0], channels * taps.itemsize, taps.itemsize)
    total = np.einsum("yt,ytx->yx", np.concatenate(weights, axis=1), np.lib.stride_tricks.as_strided(taps, *four))
    # Rounds, and cuts off what lies outside 0 … 255; cv2's types know no numbers among its operands.
    result = cv2.add(total, -_DOWN, dtype=cv2.CV_8U)  # pyright: ignore[reportCallIssue, reportArgumentType]
    result = result.reshape(height, width, channels)
    places = np.arange(width)
    first, end = np.ceil(-0.5 - shifts), np.ceil(width - 0.5 - shifts)
    holes = np.flatnonzero((places < first[:, None]) | (places >= end[:, None]))
    result.reshape(-1, channels)[holes] = options["fillcolor"]
    return result
