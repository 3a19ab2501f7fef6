"""Where tokens are: decomposed relative positions (MViTv2 §4.1, eq. 4) and learned absolute positions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape legend: B batch, N heads, D channels of a head, Q query tokens and K key tokens of the grid (class token
# not counted), q_a / k_a their number along axis a. A grid is (H, W) or (T, H, W); tokens are row-major.


def table_rows(q_size: int, k_size: int) -> int:
    """Return how many distances a relative-position table holds: every offset from -(n-1) to n-1."""
    return 2 * max(q_size, k_size, 1) - 1


def relative_index(q_size: int, k_size: int, device: torch.device) -> Tensor:
    """Return the row of the relative-position table for every (query, key) pair of one axis.

    Shape (q_size, k_size), int64. Where the two sizes differ the coarser axis is stretched to the finer one and the
    distance truncated, in single precision and in SlowFast's order of operations: 78 queries over 20 keys (video at
    312 px) round to other rows in exact arithmetic. The products are formed in double precision and then rounded,
    which is the same number and cannot be contracted into a fused multiply-add by a compiler.
    """
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    queries = _products(q_size, q_step, device)
    keys = _products(k_size, k_step, device)
    distance = queries[:, None] - keys[None, :]
    return (distance + (k_size - 1) * k_step).long()


def _products(size: int, step: float, device: torch.device) -> Tensor:
    """Return [0, 1, …] · step, each rounded once to single precision."""
    single = torch.full((), step, dtype=torch.float32, device=device)
    return (torch.arange(size, dtype=torch.float64, device=device) * single.double()).float()


def resize_table(table: Tensor, rows: int) -> Tensor:
    """Interpolate a relative-position table (rows, D) linearly to another number of rows, as SlowFast does."""
    if table.shape[0] == rows:
        return table
    columns = table.transpose(0, 1).unsqueeze(0)  # (1, D, rows)
    return F.interpolate(columns, size=rows, mode="linear", align_corners=False)[0].transpose(0, 1)


def relative_terms(
    queries: Tensor, tables: Sequence[Tensor | None], q_grid: Sequence[int], k_grid: Sequence[int]
) -> list[Tensor]:
    """Return q·R for each axis that has a table: the decomposed logits before they are spread over the keys.

    `queries` is (B, N, Q, D), *unscaled*: no published code divides the positional term by √D although eq. 3 does.
    Each term is (B, N, Q, k_a), in the order of the axes.
    """
    axes = "thw"[-len(q_grid) :]
    q_map = queries.unflatten(2, tuple(q_grid))  # (B, N, *q_grid, D)
    terms: list[Tensor] = []
    for axis, table, q_size, k_size in zip(axes, tables, q_grid, k_grid, strict=True):
        if table is None:
            continue
        index = relative_index(q_size, k_size, queries.device)
        rows = resize_table(table, table_rows(q_size, k_size))[index]  # (q_a, k_a, D)
        term = torch.einsum(f"bn{axes}d,{axis}kd->bn{axes}k", q_map, rows.to(queries.dtype))
        terms.append(term.flatten(2, 1 + len(q_grid)))
    return terms


def key_codes(tables: Sequence[Tensor | None], k_grid: Sequence[int], like: Tensor) -> Tensor:
    """Return one-hot key coordinates (K, sum of k_a over the axes with a table), in the dtype of `like`.

    The bias of eq. 4 is ⟨[q·R_h, q·R_w], [onehot(h_j), onehot(w_j)]⟩, so that these columns appended to the keys and
    the terms above appended to the queries make it part of one plain product: no Q×K bias is ever stored.
    """
    codes: list[Tensor] = []
    for axis, (table, k_size) in enumerate(zip(tables, k_grid, strict=True)):
        if table is None:
            continue
        eye = torch.eye(k_size, dtype=like.dtype, device=like.device)
        shape = [1] * len(k_grid) + [k_size]
        shape[axis] = k_size
        codes.append(eye.view(shape).expand(*k_grid, k_size).flatten(0, -2))
    return torch.cat(codes, dim=-1)


def relative_bias(terms: Sequence[Tensor], tables: Sequence[Tensor | None], k_grid: Sequence[int]) -> Tensor:
    """Spread the per-axis terms over all keys and add them: the whole (B, N, Q, K) bias, for the reference form."""
    axes = [axis for axis, table in enumerate(tables) if table is not None]
    total: Tensor | None = None
    for axis, term in zip(axes, terms, strict=True):
        shape = [1] * len(k_grid)
        shape[axis] = k_grid[axis]
        spread = term.unflatten(3, shape).expand(*term.shape[:3], *k_grid)
        total = spread if total is None else total + spread
    assert total is not None, "relative_bias needs at least one axis with a table"
    return total.flatten(3)


def resize_absolute(positions: Tensor, old: Sequence[int], new: Sequence[int], class_tokens: int) -> Tensor:
    """Interpolate absolute positions (1, class_tokens + tokens, C) from the `old` token grid to the `new` one.

    Bicubic over two axes (detectron2), trilinear over three (SlowFast); the class token's row is kept as it is.
    """
    if tuple(old) == tuple(new):
        return positions
    head, body = positions[:, :class_tokens], positions[:, class_tokens:]
    maps = body.unflatten(1, tuple(old)).movedim(-1, 1)  # (1, C, *old)
    mode = "bicubic" if len(old) == 2 else "trilinear"
    maps = F.interpolate(maps, size=tuple(new), mode=mode, align_corners=False)
    return torch.cat((head, maps.flatten(2).transpose(1, 2)), dim=1)


def square_grid(tokens: int) -> tuple[int, int] | None:
    """Return (n, n) if `tokens` is n²: a checkpoint does not say what grid its positions were trained on."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None
