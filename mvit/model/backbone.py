"""The multiscale transformer: patch embedding, blocks in four stages, classifier (MViTv2 §4 and Table 1)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvit.model.attention import ATTENTION_FORMS, AXES, LAYER_NORM_EPS, PoolingAttention
from mvit.model.block import DROP_PATH_MODES, Block, DropPath
from mvit.model.heads import ClassificationHead, Readout, read_out
from mvit.model.positions import resize_absolute
from mvit.model.window import Window

# Shape legend: B batch, L tokens (class token first where there is one, then the grid row-major), C channels,
# T, H, W frames, height, width; grid = (H/4, W/4) or (T/2, H/4, W/4) tokens.

Expand = Literal["attention", "mlp"]
RelativePositions = bool | Literal["spatial", "temporal"]
AbsolutePositions = bool | Literal["separable"]
NUM_STAGES = 4
PATCH_KERNEL, PATCH_STRIDE = (3, 7, 7), (2, 4, 4)  # over T, H, W; images use the last two


class PatchEmbed(nn.Module):
    """Overlapping patches by one strided convolution: (B, 3, [T,] H, W) → tokens (B, L, C) and their grid."""

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        kernel, stride = PATCH_KERNEL[-axes:], PATCH_STRIDE[-axes:]
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.proj = conv(3, dim, kernel, stride, padding=tuple(k // 2 for k in kernel))  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # then the tokens come out without a copy
        maps = self.proj(x)
        return maps.movedim(1, -1).flatten(1, -2), tuple(maps.shape[2:])


class MViT(nn.Module):
    """A classifier of images (B, 3, H, W) or clips (B, 3, T, H, W); build it with `mvit.create_model`.

    Args:
        embed_dim, depths, num_heads, mlp_ratio: channels and heads of stage 1 (doubling per stage), blocks per stage.
        num_classes: size of the logits.
        input_size: (H, W) or (T, H, W) in pixels and frames; sets the sizes of the position tables only, any other
            input of the same kind runs with interpolated tables.
        class_token: prepend a class token. readout: see `mvit.model.heads.read_out`.
        expand: where channels grow: "attention" of a stage's first block, or "mlp" of the previous stage's last.
        kv_stride: pooling stride of keys and values in stage 1, over H and W; halved with every query stride.
        drop_path: rate of each block, len = sum(depths).
        relative_positions: decomposed tables over all axes (True), some ("spatial", "temporal") or none (False).
        absolute_positions: one learned vector per token (True), or their sum over time and space ("separable").
        residual_pooling, qkv_bias: as in `PoolingAttention`. head_dropout: before the classifier.

    Parameter names are the official ones (facebookresearch/mvit and SlowFast).
    """

    pos_embed: nn.Parameter | None
    pos_embed_spatial: nn.Parameter | None
    pos_embed_temporal: nn.Parameter | None
    pos_embed_class: nn.Parameter | None

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        input_size: Sequence[int],
        class_token: bool,
        readout: Readout,
        expand: Expand,
        kv_stride: int,
        drop_path: Sequence[float],
        relative_positions: RelativePositions = True,
        absolute_positions: AbsolutePositions = False,
        residual_pooling: bool = True,
        qkv_bias: bool = True,
        head_dropout: float = 0.0,
        variant: str = "",
    ) -> None:
        super().__init__()
        axes = len(input_size)
        self.variant = variant
        self.num_classes = num_classes
        self.input_size = tuple(input_size)
        self.depths = tuple(depths)
        self.expand: str = expand
        self.readout: str = readout
        self.class_tokens = int(class_token)
        # Floor, as the official code sizes its tables; at other sizes the convolutions give the ceiling
        self.grid = tuple(size // stride for size, stride in zip(input_size, PATCH_STRIDE[-axes:], strict=True))
        self.stages = stage_ranges(depths)
        self._checkpointed: frozenset[int] = frozenset()

        self.patch_embed = PatchEmbed(embed_dim, axes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self._add_absolute_positions(absolute_positions, embed_dim)
        for name, parameter in self.named_parameters(recurse=False):
            assert name.startswith(("cls_token", "pos_embed"))
            nn.init.trunc_normal_(parameter, std=0.02)

        # Adaptive (paper §3): every query stride divides it; relative to the block's *input* grid
        kv_strides = [max(kv_stride // 2**stage, 1) for stage in range(NUM_STAGES) for _ in range(depths[stage])]
        self.blocks = build_blocks(
            embed_dim,
            num_heads,
            mlp_ratio,
            self.stages,
            self.grid,
            expand=expand,
            kv_strides=kv_strides,
            drop_path=drop_path,
            relative_positions=relative_positions,
            class_token=class_token,
            qkv_bias=qkv_bias,
            residual_pooling=residual_pooling,
        )
        dim = embed_dim * 2 ** (NUM_STAGES - 1)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = ClassificationHead(dim, num_classes, head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, 3, H, W) or clips (B, 3, T, H, W), normalised floats: logits (B, num_classes)."""
        tokens, _ = self.encode(x)
        return self.head(read_out(tokens, self.norm, self.readout, self.class_tokens))

    def encode(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the last block's tokens (B, L, C), not yet normalised, and their grid.

        Raises ValueError if the input is not of the kind the model was built for.
        """
        if x.ndim != len(self.input_size) + 2 or x.shape[1] != 3:
            kind = "clips (B, 3, T, H, W)" if len(self.input_size) == 3 else "images (B, 3, H, W)"
            raise ValueError(
                f"this model takes {kind}, got a tensor of shape {tuple(x.shape)}; "
                f"it was built with input_size={self.input_size}"
            )
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        positions = self._absolute_positions(grid)
        if positions is not None:
            x = x + positions.to(x.dtype)
        return run_blocks(self.blocks, range(len(self.blocks)), x, grid, self._checkpointed)

    def set_activation_checkpointing(self, stages: Collection[str]) -> None:
        """Recompute the blocks of these stages ("stage1" … "stage4") in the backward pass; () turns it off.

        Results, random numbers of drop path included, are unchanged. Raises ValueError for an unknown stage.
        """
        self._checkpointed = blocks_of(stages, self.stages)

    def set_attention_form(self, form: str) -> None:
        """Choose how attention is computed (same function): "auto" per device, "reference", "matmul" or "fused"."""
        set_attention_form(self, form)

    def _add_absolute_positions(self, kind: AbsolutePositions, dim: int) -> None:
        """Register `pos_embed` (1, class token + tokens, C), or SlowFast's separable three, or none."""
        rows: dict[str, int] = {}
        if kind == "separable":
            frames, height, width = self.grid
            rows = {"pos_embed_spatial": height * width, "pos_embed_temporal": frames}
            if self.class_tokens:
                rows["pos_embed_class"] = 1
        elif kind:
            rows = {"pos_embed": self.class_tokens + torch.Size(self.grid).numel()}
        for name in ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, rows[name], dim)) if name in rows else None)

    def _absolute_positions(self, grid: tuple[int, ...]) -> Tensor | None:
        """Return what to add to the tokens, (1, L, C) for this grid, or None."""
        positions = self.pos_embed
        if self.pos_embed_spatial is not None and self.pos_embed_temporal is not None:
            positions = self.pos_embed_temporal[:, :, None] + self.pos_embed_spatial[:, None]  # (1, T, H·W, C)
            positions = positions.flatten(1, 2)
            if self.pos_embed_class is not None:
                positions = torch.cat((self.pos_embed_class, positions), dim=1)
        if positions is None:
            return None
        return resize_absolute(positions, self.grid, grid, self.class_tokens)


def stage_ranges(depths: Sequence[int]) -> dict[str, range]:
    """Return the indices of the blocks of each stage, {"stage1": range(0, depths[0]), …}."""
    starts = [sum(depths[:stage]) for stage in range(len(depths) + 1)]
    return {f"stage{stage + 1}": range(starts[stage], starts[stage + 1]) for stage in range(len(depths))}


def blocks_of(chosen: Collection[str], stages: Mapping[str, range]) -> frozenset[int]:
    """Return the indices of the blocks of the chosen stages; raise ValueError for an unknown one."""
    unknown = sorted(set(chosen) - set(stages))
    if unknown:
        raise ValueError(f"unknown stage {unknown[0]!r} for activation checkpointing; choose from {list(stages)}")
    return frozenset(i for stage in chosen for i in stages[stage])


def set_attention_form(model: nn.Module, form: str) -> None:
    """Set the form of every attention of a model; raise ValueError for an unknown one."""
    if form not in ATTENTION_FORMS:
        raise ValueError(f"unknown attention form {form!r}; choose from {list(ATTENTION_FORMS)}")
    for module in model.modules():
        if isinstance(module, PoolingAttention):
            module.form = form


def set_drop_path_mode(model: nn.Module, mode: str) -> None:
    """Set how every drop path of a model drops; raise ValueError for an unknown mode."""
    if mode not in DROP_PATH_MODES:
        raise ValueError(f"unknown drop path mode {mode!r}; choose from {list(DROP_PATH_MODES)}")
    for module in model.modules():
        if isinstance(module, DropPath):
            module.mode = mode


def build_blocks(
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    stages: Mapping[str, range],
    grid: Sequence[int],
    *,
    expand: Expand,
    kv_strides: Sequence[int],
    drop_path: Sequence[float],
    relative_positions: RelativePositions,
    class_token: bool,
    qkv_bias: bool,
    residual_pooling: bool,
    windows: Sequence[Window | None] | None = None,
) -> nn.ModuleList:
    """Build all blocks of all stages; `kv_strides`, `drop_path` and `windows` (None: no windows) are per block."""
    built = nn.ModuleList()
    dim, grid = embed_dim, tuple(grid)
    for stage, blocks in enumerate(stages.values()):
        heads, stage_dim = num_heads * 2**stage, embed_dim * 2**stage
        for i in blocks:
            q_step = 2 if stage > 0 and i == blocks.start else 1
            stride_q, stride_kv = ((1,) * (len(grid) - 2) + (step, step) for step in (q_step, kv_strides[i]))
            last = i == blocks.stop - 1 and stage < NUM_STAGES - 1
            attn = PoolingAttention(
                dim,
                stage_dim,
                heads,
                stride_q,
                stride_kv,
                _table_sizes(grid, stride_q, stride_kv, relative_positions),
                class_token=class_token,
                qkv_bias=qkv_bias,
                residual_pooling=residual_pooling,
                window=windows[i] if windows else None,
            )
            dim_out = 2 * stage_dim if expand == "mlp" and last else stage_dim
            built.append(Block(dim, stage_dim, dim_out, mlp_ratio, drop_path[i], attn))
            grid = tuple(size // stride for size, stride in zip(grid, stride_q, strict=True))
            dim = dim_out
    return built


def run_blocks(
    blocks: nn.ModuleList, which: range, x: Tensor, grid: tuple[int, ...], checkpointed: Collection[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Send tokens (B, L, C) on `grid` through some of the blocks, recomputing the `checkpointed` ones in backward."""
    for i in which:
        if i in checkpointed and torch.is_grad_enabled():
            x, grid = checkpoint(blocks[i], x, grid, use_reentrant=False)
        else:
            x, grid = blocks[i](x, grid)
    return x, grid


def _table_sizes(
    grid: Sequence[int], stride_q: Sequence[int], stride_kv: Sequence[int], kind: RelativePositions
) -> list[tuple[int, int] | None]:
    """Return per axis the (query, key) sizes its relative table is made for, None for no table."""
    wanted = {True: "thw", False: "", "spatial": "hw", "temporal": "t"}[kind]
    return [
        (size // q_step, size // kv_step) if axis in wanted else None
        for axis, size, q_step, kv_step in zip(AXES[-len(grid) :], grid, stride_q, stride_kv, strict=True)
    ]
