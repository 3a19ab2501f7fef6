"""Attention within windows: which blocks have them, cutting pooled maps into them, joining them (MViTv2 §4.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape legend: B batch, N heads, D channels of a head, H, W a token grid *after pooling*, L = H·W tokens, row-major,
# w the side of a window on that grid, n the number of windows of one image, row-major.

AttentionScope = Literal["hwin", "window", "swin", "full"]
"""Who sees whom. "hwin": windows, but for the last block of stages 2, 3 and 4, which sees all (paper §4.2).
"window": windows everywhere. "swin": windows, moved by half their side in every second block of a stage.
"full": everybody sees all."""
ATTENTION_SCOPES: tuple[str, ...] = get_args(AttentionScope)

# Added to the logit of a pair that the shift brought together from opposite edges of the map. Swin adds -100, whose
# exponential is a subnormal number: CPUs multiply these so slowly that the step took twice as long. This one's is 0.
_APART = -1000.0


@dataclass(frozen=True)
class Window:
    """The square windows of one block, in tokens of its input grid."""

    size: int
    shifted: bool = False


@dataclass(frozen=True)
class Cut:
    """The same windows on a pooled grid: side and shift in pooled tokens."""

    size: int
    shift: int = 0


def place_windows(scope: AttentionScope, stages: Mapping[str, range], size: int) -> list[Window | None]:
    """Return the windows of every block, None where a block sees the whole map.

    `size` is the side of stage 1's windows; it halves with the grid, so that windows keep their share of the picture.
    The first block of a stage still gets the previous stage's size: its windows lie on the grid before its pooling.
    Raises ValueError for a size that cannot be halved so.
    """
    halvings = len(stages) - 1
    if size < 1 or size % 2**halvings:
        raise ValueError(f"window_size={size} must be a positive multiple of {2**halvings}: it halves with every stage")
    windows: list[Window | None] = []
    for stage, blocks in enumerate(stages.values()):
        for i in blocks:
            on_stage = stage - 1 if stage > 0 and i == blocks.start else stage
            sees_all = scope == "full" or (scope == "hwin" and stage > 0 and i == blocks.stop - 1)
            shifted = scope == "swin" and (i - blocks.start) % 2 == 1
            windows.append(None if sees_all else Window(size // 2**on_stage, shifted))
    return windows


def cuts_after_pooling(window: Window, stride_q: Sequence[int], stride_kv: Sequence[int]) -> tuple[Cut, Cut]:
    """Return a block's windows on the grid of its queries and on that of its keys.

    A shift is half the side, or the next smaller number of tokens that either stride divides: else queries and keys
    would move by different distances. Raises ValueError for a side that the strides do not divide.
    """
    steps = {*stride_q, *stride_kv}
    step = math.lcm(*steps)
    if len(stride_q) != 2 or len({*stride_q}) > 1 or len({*stride_kv}) > 1:
        raise ValueError(f"windows are for images pooled alike over H and W, not by {stride_q} and {stride_kv}")
    if window.size % step:
        raise ValueError(
            f"windows of {window.size} tokens cannot be cut on grids pooled by {stride_q[0]} (queries) and "
            f"{stride_kv[0]} (keys): give a window_size that makes them a multiple of {step}, or a smaller kv_stride"
        )
    shift = window.size // 2 // step * step if window.shifted else 0
    q_step, kv_step = stride_q[0], stride_kv[0]
    return Cut(window.size // q_step, shift // q_step), Cut(window.size // kv_step, shift // kv_step)


def partition(x: Tensor, grid: Sequence[int], cut: Cut) -> Tensor:
    """Cut tokens (B, N, L, D) on `grid` into windows (B·n, N, w·w, D).

    A map that the windows do not divide is padded with zeros at the right and at the bottom. The padding takes part in
    attention as keys and values of zero, unmasked (detectron2): the published weights were trained so.
    """
    x = x.unflatten(2, tuple(grid))  # (B, N, H, W, D)
    below, right = (-size % cut.size for size in grid)
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    shifts = _shifts(grid, cut)
    if any(shifts):
        x = x.roll([-shift for shift in shifts], (2, 3))
    x = x.unflatten(3, (-1, cut.size)).unflatten(2, (-1, cut.size))  # (B, N, rows, w, columns, w, D)
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def unpartition(x: Tensor, grid: Sequence[int], cut: Cut) -> Tensor:
    """Join windows (B·n, N, w·w, D) to the tokens (B, N, L, D) of `grid`, without the padding: `partition` undone."""
    rows, columns = (math.ceil(size / cut.size) for size in grid)
    x = x.unflatten(0, (-1, rows, columns)).unflatten(4, (cut.size, cut.size))  # (B, rows, columns, N, w, w, D)
    x = x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)  # (B, N, padded H, padded W, D)
    shifts = _shifts(grid, cut)
    if any(shifts):
        x = x.roll(shifts, (2, 3))
    return x[:, :, : grid[0], : grid[1]].flatten(2, 3)


def separating_columns(
    q_grid: Sequence[int], k_grid: Sequence[int], q_cut: Cut, k_cut: Cut, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return Swin's mask as columns to append to queries and keys, (n, w·w, 4) each, or None if nothing is shifted.

    The cyclic shift makes the last row and column of windows out of two opposite edges of the map, which must not see
    each other. The product of the columns is 0 within an edge, -1000 for each axis on which query and key come from
    different edges: a mask without a matrix of queries × keys.
    """
    if not any(_shifts(q_grid, q_cut)):
        return None
    wrapped_q, wrapped_k = (_wrapped(grid, cut, like) for grid, cut in ((q_grid, q_cut), (k_grid, k_cut)))
    return torch.cat((1 - wrapped_q, wrapped_q), dim=-1) * _APART, torch.cat((wrapped_k, 1 - wrapped_k), dim=-1)


def _shifts(grid: Sequence[int], cut: Cut) -> list[int]:
    """Return the shift over H and W: none where one window spans the map, as in Swin."""
    return [cut.shift if size > cut.size else 0 for size in grid]


def _wrapped(grid: Sequence[int], cut: Cut, like: Tensor) -> Tensor:
    """Tell of every token of every window, (n, w·w, 2): 1 where the shift brought it around the edge of H, of W."""
    flags: list[Tensor] = []
    for size, shift in zip(grid, _shifts(grid, cut), strict=True):
        padded = math.ceil(size / cut.size) * cut.size
        flags.append((torch.arange(padded, device=like.device) >= padded - shift).to(like.dtype))
    rows, columns = flags[0], flags[1]
    maps = torch.stack(torch.broadcast_tensors(rows[:, None], columns[None, :]), dim=-1)  # (padded H, padded W, 2)
    windows = partition(maps.flatten(0, 1)[None, None], maps.shape[:2], Cut(cut.size))  # not shifted again
    return windows[:, 0]
