"""Attention within windows computes what plain loops over the windows compute, in every form; windows stand where the
paper puts them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvit.model.attention import ATTENTION_FORMS, PoolingAttention
from mvit.model.backbone import stage_ranges
from mvit.model.window import (
    Cut,
    Window,
    cuts_after_pooling,
    partition,
    place_windows,
    separating_columns,
    unpartition,
)
from mvit.variants import VARIANTS

# detectron2's `last_block_indexes` without the first: these blocks see the whole map
GLOBAL_BLOCKS = {
    "mvitv2_tiny": (2, 7, 9),
    "mvitv2_small": (2, 13, 15),
    "mvitv2_base": (4, 20, 23),
    "mvitv2_large": (7, 43, 47),
    "mvitv2_huge": (11, 71, 79),
}


def build(window: Window | None, stride_q: int, stride_kv: int, table: int = 8) -> PoolingAttention:
    torch.manual_seed(0)
    sizes = [(table // stride_q, table // stride_kv)] * 2
    attention = PoolingAttention(6, 8, 2, (stride_q,) * 2, (stride_kv,) * 2, sizes, window=window).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def pooled_heads(attention: PoolingAttention, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Return q, k, v as maps (B, N, H', W', D), pooled head by head."""
    maps: list[Tensor] = []
    for part, letter in zip(attention.qkv(x).chunk(3, dim=-1), "qkv", strict=True):
        pool, norm = getattr(attention, f"pool_{letter}"), getattr(attention, f"norm_{letter}")
        heads: list[Tensor] = []
        for head in part.chunk(attention.num_heads, dim=-1):
            planes = head.transpose(1, 2).unflatten(2, grid)
            planes = F.conv2d(planes, pool.weight, stride=pool.stride, padding=1, groups=head.shape[-1])
            heads.append(norm(planes.permute(0, 2, 3, 1)))
        maps.append(torch.stack(heads, dim=1))
    return maps


def places(size: int, cut: Cut) -> list[tuple[int, int, bool, int]]:
    """Return, for every position of the padded axis: its window, its place there, whether from the far edge, itself."""
    padded = -(-size // cut.size) * cut.size
    shift = cut.shift if size > cut.size else 0
    return [((i - shift) % padded // cut.size, (i - shift) % padded % cut.size, i < shift, i) for i in range(padded)]


def plain_attention(attention: PoolingAttention, x: Tensor, grid: tuple[int, int], window: Window) -> Tensor:
    """Window attention with residual pooling, one query after the other, straight from the definition."""
    step_q, step_kv = attention.pool_q.stride[0], attention.pool_k.stride[0]
    shift = 0
    if window.shifted:
        shift = max(n for n in range(window.size // 2 + 1) if n % step_q == 0 and n % step_kv == 0)
    q_cut, k_cut = Cut(window.size // step_q, shift // step_q), Cut(window.size // step_kv, shift // step_kv)
    q, k, v = pooled_heads(attention, x, grid)
    height, width = q.shape[2:4]
    rows, columns = (places(size, k_cut) for size in k.shape[2:4])
    # The whole padded map of keys and values is zero beyond the picture
    beyond = (0, 0, 0, len(columns) - k.shape[3], 0, len(rows) - k.shape[2])
    k, v = F.pad(k, beyond), F.pad(v, beyond)
    up_q, up_k = max(k_cut.size / q_cut.size, 1), max(q_cut.size / k_cut.size, 1)
    tables = attention.rel_pos_h, attention.rel_pos_w
    out = torch.empty_like(q)
    for qy, qx in itertools.product(places(height, q_cut)[:height], places(width, q_cut)[:width]):
        seen = [
            (ky, kx)
            for ky, kx in itertools.product(rows, columns)
            if (ky[0], ky[2], kx[0], kx[2]) == (qy[0], qy[2], qx[0], qx[2])
        ]
        ys, xs = [ky[3] for ky, _ in seen], [kx[3] for _, kx in seen]
        query = q[:, :, qy[3], qx[3]]  # (B, N, D)
        logits = torch.einsum("bnd,bnkd->bnk", query, k[:, :, ys, xs]) / query.shape[-1] ** 0.5
        for table, place, axis in ((tables[0], qy, 0), (tables[1], qx, 1)):
            if table is not None:
                index = [int(place[1] * up_q - key[axis][1] * up_k + (k_cut.size - 1) * up_k) for key in seen]
                logits = logits + torch.einsum("bnd,kd->bnk", query, table[index])
        attended = torch.einsum("bnk,bnkd->bnd", logits.softmax(-1), v[:, :, ys, xs])
        out[:, :, qy[3], qx[3]] = attended + query
    return attention.proj(out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("stride_q", "stride_kv"), [(1, 1), (1, 4), (2, 2), (2, 1)])
@pytest.mark.parametrize("grid", [(16, 8), (9, 19), (5, 17)])
def test_windows_are_what_plain_loops_compute(
    grid: tuple[int, int], stride_q: int, stride_kv: int, shifted: bool, form: str
) -> None:
    window = Window(8, shifted)
    attention = build(window, stride_q, stride_kv)
    attention.form = form
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    with torch.no_grad():
        out, new_grid = attention(x, grid)
        assert new_grid == tuple(-(-size // stride_q) for size in grid)
        assert (out - plain_attention(attention, x, grid, window)).abs().max() < 1e-10


@pytest.mark.parametrize("shifted", [False, True])
def test_all_forms_have_the_same_gradients_in_windows(shifted: bool) -> None:
    grads: list[list[Tensor]] = []
    for form in ("reference", "matmul", "fused"):
        attention = build(Window(8, shifted), 2, 1)
        attention.form = form
        x = torch.randn(2, 9 * 19, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        out, _ = attention(x.requires_grad_(), (9, 19))
        out.square().sum().backward()
        found = [x.grad, *(parameter.grad for parameter in attention.parameters())]
        grads.append([grad for grad in found if grad is not None])
        assert len(grads[-1]) == len(found)
    for other in grads[1:]:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(grads[0], other, strict=True))


def test_a_window_that_is_the_whole_map_is_full_attention() -> None:
    x = torch.randn(2, 64, 6, dtype=torch.float64)
    full, _ = build(None, 1, 2)(x, (8, 8))
    for shifted in (False, True):  # Swin shifts nothing where one window spans the map
        out, _ = build(Window(8, shifted), 1, 2)(x, (8, 8))
        assert torch.equal(out, full)


@pytest.mark.parametrize(
    ("grid", "cut"), [((4, 6), Cut(2)), ((5, 7), Cut(3)), ((5, 7), Cut(4, 1)), ((2, 9), Cut(4, 2))]
)
def test_windows_are_joined_as_they_were_cut(grid: tuple[int, int], cut: Cut) -> None:
    tokens = torch.randn(2, 3, grid[0] * grid[1], 5)
    windows = partition(tokens, grid, cut)
    count = -(-grid[0] // cut.size) * -(-grid[1] // cut.size)
    assert windows.shape == (2 * count, 3, cut.size**2, 5)
    assert torch.equal(unpartition(windows, grid, cut), tokens)


def test_windows_are_row_major_and_padded_with_zeros_right_and_below() -> None:
    tokens = torch.arange(1.0, 10.0)[None, None, :, None]  # a 3 × 3 map
    windows = partition(tokens, (3, 3), Cut(2))[:, 0, :, 0]
    assert windows.tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize("name", VARIANTS)
def test_hybrid_windows_leave_the_published_blocks_global(name: str) -> None:
    windows = place_windows("hwin", stage_ranges(VARIANTS[name].depths), 56)
    assert tuple(i for i, window in enumerate(windows) if window is None) == GLOBAL_BLOCKS[name]


def test_windows_halve_with_the_grid_one_block_after_the_stage_begins() -> None:
    """The first block of a stage is cut after its pooling, so its windows are the previous stage's before it."""
    stages = stage_ranges(VARIANTS["mvitv2_tiny"].depths)
    sizes = [window.size for window in place_windows("window", stages, 56) if window is not None]
    assert sizes == [56, 56, 28, 28, 14, 14, 14, 14, 14, 7]
    swin = [window.shifted for window in place_windows("swin", stages, 56) if window is not None]
    assert swin == [False, False, True, False, True, False, True, False, False, True]
    assert place_windows("full", stages, 56) == [None] * 10


def test_queries_and_keys_are_shifted_by_the_same_distance() -> None:
    assert cuts_after_pooling(Window(56, shifted=True), (1, 1), (4, 4)) == (Cut(56, 28), Cut(14, 7))
    # Half of 14 is odd, and queries move by whole pooled tokens: 6 instead of 7
    assert cuts_after_pooling(Window(14, shifted=True), (2, 2), (1, 1)) == (Cut(7, 3), Cut(14, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_of_shifted_windows_leaves_no_subnormal_probabilities(dtype: torch.dtype) -> None:
    """A probability of exp(-100), which is not quite 0 in float32, makes the products slow on CPUs."""
    columns = separating_columns((9, 19), (9, 19), Cut(8, 4), Cut(8, 4), torch.zeros((), dtype=dtype))
    assert columns is not None
    queries, keys = columns
    assert (queries @ keys.transpose(1, 2)).exp().unique().tolist() == [0.0, 1.0]


def test_windows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"window_size=20 must be a positive multiple of 8: it halves with every stage"
    ):
        place_windows("hwin", stage_ranges((1, 1, 1, 1)), 20)
    with pytest.raises(ValueError, match=r"windows of 14 tokens.*\(keys\).*multiple of 4, or a smaller kv_stride"):
        cuts_after_pooling(Window(14), (1, 1), (4, 4))
    with pytest.raises(ValueError, match="for images pooled alike over H and W"):
        cuts_after_pooling(Window(14), (1, 1, 1), (1, 2, 2))
