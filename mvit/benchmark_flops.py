"""FLOPs of a classifier from its sizes alone, and the rate at which a device multiplies matrices."""

import math
import time
from collections.abc import Sequence

import torch

from mvit.model.attention import PoolingAttention
from mvit.model.backbone import MViT
from mvit.model.block import Block


def forward_macs(model: MViT, input_size: Sequence[int]) -> int:
    """Return the multiply-adds of one image's or clip's forward pass: products and convolutions, as papers count.

    Attention counts as published, without the columns that fold the relative positions into it; norms, activations and
    sums do not count.
    """
    macs, grid = _patches(model, input_size)
    for block in model.blocks:
        assert isinstance(block, Block)
        more, grid = _block(block, grid)
        macs += more
    head = model.head.projection
    return macs + head.in_features * head.out_features


def training_macs(model: MViT, input_size: Sequence[int]) -> int:
    """Return the multiply-adds of one sample's forward and backward pass, nothing recomputed.

    Each product is followed by two of its size, one per operand; only the pixels want no gradient.
    """
    return 3 * forward_macs(model, input_size) - _patches(model, input_size)[0]


def _patches(model: MViT, input_size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    conv = model.patch_embed.proj
    grid = tuple(math.ceil(size / step) for size, step in zip(input_size, conv.stride, strict=True))
    return math.prod(grid) * conv.weight.numel(), grid


def _block(block: Block, grid: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return a block's multiply-adds on tokens of `grid`, and the grid that it leaves."""
    attn = block.attn
    assert isinstance(attn, PoolingAttention)
    assert attn.cuts is None, "windows are not counted"
    extra, channels = attn.class_tokens, attn.proj.in_features
    q_grid, k_grid = (_pooled(grid, pool.stride) for pool in (attn.pool_q, attn.pool_k))
    patches, queries, keys = (math.prod(sizes) for sizes in (grid, q_grid, k_grid))
    macs = (patches + extra) * attn.qkv.weight.numel()
    macs += 3 ** len(grid) * channels * (queries + 2 * keys)  # depthwise pooling of q, k and v
    macs += 2 * channels * (queries + extra) * (keys + extra)  # q·kᵀ, and its product with v
    tables = (getattr(attn, f"rel_pos_{axis}") for axis in attn.axes)
    macs += sum(channels * queries * size for table, size in zip(tables, k_grid, strict=True) if table is not None)
    macs += (queries + extra) * (attn.proj.weight.numel() + block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
    if block.proj is not None:  # the skip's, before or after the queries are pooled
        macs += ((patches if block.expand_in_attention else queries) + extra) * block.proj.weight.numel()
    return macs, q_grid


def _pooled(grid: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(size / step) for size, step in zip(grid, stride, strict=True))


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Measure the peak rate, FLOP/s, at which `device` multiplies large square matrices of `dtype`.

    The best of some rounds. On the CPU per second of process time, of all threads together, as the benchmark counts.
    """
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(rounds + 1):  # the first one only warms up, but cannot be the best
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.mm(a, b)
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            since = time.process_time()
            torch.mm(a, b)
            best = min(best, time.process_time() - since)
    return 2 * side**3 / best
