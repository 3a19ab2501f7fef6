"""Pooling attention over two or three axes (MViTv2 §3 and §4.1): one class for images and for video."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit.model.linear import Linear
from mvit.model.positions import key_codes, relative_bias, relative_terms, table_rows
from mvit.model.window import Window, cuts_after_pooling, partition, separating_columns, unpartition

# Shape legend: B batch, L tokens (class token first where there is one, then the grid row-major), N heads,
# D channels of a head, C = N·D channels, q / k the query and the key grid after pooling, E = sum of k over the axes.

AttentionForm = Literal["auto", "reference", "matmul", "fused"]
ATTENTION_FORMS: tuple[str, ...] = get_args(AttentionForm)
AXES = ("t", "h", "w")
LAYER_NORM_EPS = 1e-6  # every LayerNorm of every published MViTv2


class DepthwisePool(nn.Module):
    """Depthwise 3×3(×3) convolution without bias, one kernel per head channel, shared by all heads.

    Input (B, C, *grid) in channels-last memory, C = N·D; output (B, C, *ceil(grid / stride)), channels-last. All heads
    are pooled by one convolution whose kernel is repeated: no reshape of heads into the batch, hence no copies.
    """

    def __init__(self, head_dim: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.weight = nn.Parameter(torch.empty(head_dim, 1, *[3] * len(self.stride)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # torch's default for convolutions, as published

    def forward(self, maps: Tensor) -> Tensor:
        planar = maps.ndim == 4
        conv = F.conv2d if planar else F.conv3d
        channels = maps.shape[1]
        kernel = self.weight.repeat(channels // self.weight.shape[0], *[1] * (self.weight.ndim - 1))
        layout = torch.channels_last if planar else torch.channels_last_3d
        if maps.dtype == torch.bfloat16 and maps.device.type == "cpu" and max(self.stride) > 1:
            # oneDNN's backward of a strided bf16 depthwise convolution costs 3 to 5 times the fp32 one
            with torch.autocast("cpu", enabled=False):
                maps = maps.to(torch.float32, memory_format=layout)  # type and layout in one copy
                pooled = conv(maps, kernel.float(), stride=self.stride, padding=1, groups=channels)
            return pooled.bfloat16()
        maps = maps.contiguous(memory_format=layout)
        return conv(maps, kernel, stride=self.stride, padding=1, groups=channels)


class PoolingAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are pooled over the token grid.

    Args:
        dim, dim_out: input channels; channels of q, k, v and of the output (larger where a stage grows them here).
        num_heads: must divide `dim_out`.
        stride_q, stride_kv: pooling strides per axis, (H, W) or (T, H, W).
        table_sizes: per axis (query size, key size) of the trained grid, for the relative tables; None = no table.
        class_token: whether token 0 is a class token; it is not pooled and gets no relative position.
        residual_pooling: add the pooled query to the output (§4.1, eq. 5), the class token's row excepted, as in the
            official code (timm adds it there too and so computes another function).
        window: attend within these windows only, cut after pooling (§4.2); for images without a class token.
    """

    form: str  # one of ATTENTION_FORMS
    probe: Callable[[Tensor, Tensor], None] | None = None
    """Told the queries and keys (B, N, L, D + E) whose products are the logits, when somebody looks (`mvit.watch`)."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        stride_q: Sequence[int],
        stride_kv: Sequence[int],
        table_sizes: Sequence[tuple[int, int] | None],
        *,
        class_token: bool = False,
        qkv_bias: bool = True,
        residual_pooling: bool = True,
        form: AttentionForm = "auto",
        window: Window | None = None,
    ) -> None:
        super().__init__()
        assert window is None or not class_token, "a class token lies in no window"
        self.cuts = None if window is None else cuts_after_pooling(window, stride_q, stride_kv)
        self.num_heads = num_heads
        self.class_tokens = int(class_token)
        self.residual_pooling = residual_pooling
        self.form = form
        head_dim = dim_out // num_heads
        self.scale = head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = Linear(dim_out, dim_out)
        self.pool_q = DepthwisePool(head_dim, stride_q)
        self.norm_q = nn.LayerNorm(head_dim, eps=LAYER_NORM_EPS)
        self.pool_k = DepthwisePool(head_dim, stride_kv)
        self.norm_k = nn.LayerNorm(head_dim, eps=LAYER_NORM_EPS)
        self.pool_v = DepthwisePool(head_dim, stride_kv)
        self.norm_v = nn.LayerNorm(head_dim, eps=LAYER_NORM_EPS)
        self.axes = AXES[-len(table_sizes) :]
        for axis, sizes in zip(self.axes, table_sizes, strict=True):
            table = None if sizes is None else nn.Parameter(torch.empty(table_rows(*sizes), head_dim))
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
            self.register_parameter(f"rel_pos_{axis}", table)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Attend over tokens (B, L, dim) of `grid`; return (B, L', dim_out) and the pooled query grid."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, L, C)
        q, q_grid = self._pool(q, grid, self.pool_q, self.norm_q)  # (B, N, Lq, D)
        k, k_grid = self._pool(k, grid, self.pool_k, self.norm_k)  # (B, N, Lk, D)
        v, _ = self._pool(v, grid, self.pool_v, self.norm_v)
        attend = self._attend if self.cuts is None else self._attend_in_windows
        out = attend(q, k, v, q_grid, k_grid)  # (B, N, Lq, D)
        out = out.transpose(1, 2)  # (B, Lq, N, D)
        if self.residual_pooling:
            skip = q.transpose(1, 2)
            skip = F.pad(skip[:, 1:], (0, 0, 0, 0, 1, 0)) if self.class_tokens else skip
            out = skip + out  # in this order the sum has the skip's layout, the tokens', and is not copied below
        out = self.proj(out.flatten(2))
        return out, q_grid

    def _pool(self, x: Tensor, grid: Sequence[int], pool: nn.Module, norm: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
        dtype = x.dtype
        maps = x[:, self.class_tokens :].unflatten(1, tuple(grid)).movedim(-1, 1)  # (B, C, *grid), channels last
        maps = pool(maps)
        pooled = maps.movedim(1, -1).flatten(1, -2)  # (B, tokens, C)
        if self.class_tokens:
            pooled = torch.cat((x[:, :1], pooled), dim=1)
        # Autocast on CUDA normalises into fp32; back to the compute dtype before anything of size L × (D + E) is made
        heads = norm(pooled.unflatten(-1, (self.num_heads, -1))).to(dtype)  # (B, L, N, D)
        return heads.transpose(1, 2), tuple(maps.shape[2:])

    def _attend_in_windows(
        self, q: Tensor, k: Tensor, v: Tensor, q_grid: Sequence[int], k_grid: Sequence[int]
    ) -> Tensor:
        assert self.cuts is not None
        q_cut, k_cut = self.cuts
        apart = separating_columns(q_grid, k_grid, q_cut, k_cut, q)
        if apart is not None:  # for every image and head: (B·n, N, w·w, 4)
            q_apart, k_apart = (columns.repeat(q.shape[0], 1, 1).unsqueeze(1) for columns in apart)
            apart = q_apart.expand(-1, q.shape[1], -1, -1), k_apart.expand(-1, q.shape[1], -1, -1)
        q, k, v = partition(q, q_grid, q_cut), partition(k, k_grid, k_cut), partition(v, k_grid, k_cut)
        out = self._attend(q, k, v, (q_cut.size,) * 2, (k_cut.size,) * 2, apart)  # (B·n, N, w·w, D)
        return unpartition(out, q_grid, q_cut)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_grid: Sequence[int],
        k_grid: Sequence[int],
        apart: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend over whole grids, or windows; `apart`: columns of q and k whose product is added to the logits."""
        tables = [getattr(self, f"rel_pos_{axis}") for axis in self.axes]
        terms = relative_terms(q[:, :, self.class_tokens :], tables, q_grid, k_grid)
        form = default_form(q.device) if self.form == "auto" else self.form
        if form == "reference":
            bias = F.pad(relative_bias(terms, tables, k_grid), (self.class_tokens, 0) * 2) if terms else None
            if apart is not None:
                mask = apart[0] @ apart[1].transpose(-2, -1)
                bias = mask if bias is None else bias + mask
            return _attend_reference(q, k, v, self.scale, bias)
        k = k * self.scale  # scales the smaller operand; the positional columns must stay unscaled
        if terms:
            codes = key_codes(tables, k_grid, k)  # (K, E)
            # The class token's rows of the extra columns are zero: it neither has nor causes a bias
            extra = F.pad(torch.cat(terms, dim=-1), (0, 0, self.class_tokens, 0))
            codes = F.pad(codes, (0, 0, self.class_tokens, 0)).expand(*k.shape[:2], -1, -1)
            q, k = torch.cat((q, extra.to(q.dtype)), dim=-1), torch.cat((k, codes), dim=-1)
        if apart is not None:
            q, k = torch.cat((q, apart[0]), dim=-1), torch.cat((k, apart[1]), dim=-1)
        if self.probe is not None:
            self.probe(q, k)
        return _attend_matmul(q, k, v) if form == "matmul" else _attend_fused(q, k, v)


def default_form(device: torch.device) -> str:
    """Choose the attention form for a device: "matmul" on the CPU, "fused" elsewhere.

    Measured on CPU: "matmul" is the fastest in bf16 (a training step of tiny at 224 px takes 0.85 of the time "fused"
    does) and level with it in fp32; "fused" needs about a third less memory at 512 px. On CUDA the choice is reasoned,
    not measured yet: the flash kernels take head widths up to 256, and D + E is 152 at most at 224 px.
    """
    return "matmul" if device.type == "cpu" else "fused"


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v with the bias stored whole: eq. 3 as it reads, for tests."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def _attend_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over augmented q and k (B, N, L, D + E); stores the probabilities, but no bias beside them."""
    return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def _attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in one kernel that stores no Lq × Lk matrix; v is widened, since the kernels want equal widths."""
    dim, width = v.shape[-1], q.shape[-1]
    padding = -width % 8 if q.device.type == "cuda" else 0  # CUDA kernels want rows of 16 bytes
    if padding:
        q, k = F.pad(q, (0, padding)), F.pad(k, (0, padding))
    v = F.pad(v, (0, width + padding - dim))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :dim]
