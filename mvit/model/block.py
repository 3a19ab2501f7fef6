"""One transformer block: pooling attention, MLP, the skip that pools with them, drop path."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit.model.attention import LAYER_NORM_EPS
from mvit.model.linear import Linear

# Shape legend: B batch, L tokens (class token first where there is one, then the grid row-major), C channels,
# T, H, W the token grid.


DropPathMode = Literal["auto", "mask", "skip"]
"""How drop path drops a sample's branch, never how often: "mask" computes it and multiplies by 0, "skip" leaves it out
of the branch's batch, "auto" chooses by device."""
DROP_PATH_MODES: tuple[str, ...] = get_args(DropPathMode)


@dataclass(frozen=True)
class Kept:
    """The samples of a batch whose residual branch is computed."""

    samples: Tensor
    """Indices (n,) on the batch's device, also where all are kept: ranks whose autograd graphs differ would begin to
    recompute a block at different nodes, and under ZeRO-3 gather its weights in different orders."""
    scale: float
    """What their branch is multiplied by: 1 / (1 - rate), or 0 for the one that stands in where all were dropped."""

    def select(self, x: Tensor) -> Tensor:
        """Return these samples of (B, L, C)."""
        return x.index_select(0, self.samples)

    def add(self, skip: Tensor, branch: Tensor) -> Tensor:
        """Add the branch (n, L, C) of these samples to the skip connection (B, L, C)."""
        # index_add wants one dtype; under autocast the two may differ, and + would give the wider
        dtype = torch.promote_types(skip.dtype, branch.dtype)
        return skip.to(dtype).index_add(0, self.samples, branch.to(dtype), alpha=self.scale)


class DropPath(nn.Module):
    """Zero a residual branch of single samples with probability `rate`, scaling the kept ones (stochastic depth).

    A block does so by `draw`, so that the dropped samples cost nothing, or where that gives None by calling this
    module, which multiplies. The two drop the same samples for the same random numbers. A branch is never skipped for
    the whole batch: ZeRO-3 would go on with the gradients of an earlier step.
    """

    mode: str = "auto"  # one of DROP_PATH_MODES

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def draw(self, x: Tensor) -> Kept | None:
        """Draw which samples of `x` (B, …) keep their branch; None: all are computed, and `forward` drops.

        The numbers are drawn on the host, since an accelerator would have to be waited for to learn how many samples
        are left. Each sample is kept by itself, as ever; DINOv2's subset of fixed size ties them to each other.
        """
        if not self.training or self.rate == 0.0 or not self._skips(x):
            return None
        keep = 1.0 - self.rate
        mask = torch.empty(x.shape[0], 1, 1).bernoulli_(keep)
        samples = mask.flatten().nonzero().flatten()
        if len(samples) == 0:
            return Kept(torch.zeros(1, dtype=torch.int64, device=x.device), 0.0)
        return Kept(samples.to(x.device, non_blocking=True), 1.0 / keep)

    def _skips(self, x: Tensor) -> bool:
        """Tell whether to compute kept samples only: measured on the CPU; a compiled graph wants one batch size."""
        if torch.compiler.is_compiling() or self.mode == "mask":
            return False
        return self.mode == "skip" or x.device.type == "cpu"

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pooling attention and MLP with residuals; channels grow in one of the two where dim, attn_dim, dim_out differ."""

    def __init__(
        self, dim: int, attn_dim: int, dim_out: int, mlp_ratio: float, drop_path: float, attn: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(attn_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(attn_dim, int(attn_dim * mlp_ratio), dim_out)
        self.drop_path = DropPath(drop_path)
        self.expand_in_attention = dim != attn_dim
        self.proj = Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """(B, L, dim) on `grid` → (B, L', dim_out) on the grid pooled by the query stride."""
        # Where channels grow the skip starts from the *normalised* input, elsewhere from the raw one (as published)
        grows = self.proj is not None and self.expand_in_attention
        kept = self.drop_path.draw(x)
        y = self.norm1(x if kept is None or grows else kept.select(x))
        attended, new_grid = self.attn(kept.select(y) if kept is not None and grows else y, grid)
        skip = pool_skip(self.proj(y) if self.proj is not None and grows else x, grid, new_grid)
        x = skip + self.drop_path(attended) if kept is None else kept.add(skip, attended)

        grows = self.proj is not None and not self.expand_in_attention
        kept = self.drop_path.draw(x)
        y = self.norm2(x if kept is None or grows else kept.select(x))
        branch = self.mlp(kept.select(y) if kept is not None and grows else y)
        skip = self.proj(y) if self.proj is not None and grows else x
        return (skip + self.drop_path(branch) if kept is None else kept.add(skip, branch)), new_grid


def pool_skip(x: Tensor, grid: tuple[int, ...], new_grid: tuple[int, ...]) -> Tensor:
    """Max-pool tokens (B, L, C) 3×3 with stride 2 over height and width where the queries were; else return them.

    Time is never pooled after the patch embedding, so frames are folded into the batch.
    """
    if grid == new_grid:
        return x
    height, width = grid[-2:]
    class_tokens = x.shape[1] - torch.Size(grid).numel()
    maps = x[:, class_tokens:].reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)  # (B·T, C, H, W)
    maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
    pooled = maps.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[-1])
    return torch.cat((x[:, :class_tokens], pooled), dim=1) if class_tokens else pooled
