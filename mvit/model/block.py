"""One transformer block: pooling attention, MLP, the skip that pools with them, drop path."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit.model.attention import LAYER_NORM_EPS
from mvit.model.linear import Linear

# Shape legend: B batch, L tokens (class token first where there is one, then the grid row-major), C channels,
# T, H, W the token grid.


class DropPath(nn.Module):
    """Zero a residual branch of single samples with probability `rate`, scaling the kept ones (stochastic depth).

    The branch is always computed: a block skipped conditionally would leave stale gradients under ZeRO-3.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

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
        y = self.norm1(x)
        attended, new_grid = self.attn(y, grid)
        # Where channels grow the skip starts from the *normalised* input, elsewhere from the raw one (as published)
        skip = self.proj(y) if self.proj is not None and self.expand_in_attention else x
        x = pool_skip(skip, grid, new_grid) + self.drop_path(attended)
        y = self.norm2(x)
        skip = self.proj(y) if self.proj is not None and not self.expand_in_attention else x
        return skip + self.drop_path(self.mlp(y)), new_grid


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
