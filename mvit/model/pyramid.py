"""The backbone of a detector: MViTv2 whose stages give one feature map each (MViTv2 §4.2)."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from mvit.model.attention import LAYER_NORM_EPS
from mvit.model.backbone import (
    NUM_STAGES,
    PATCH_STRIDE,
    Expand,
    PatchEmbed,
    blocks_of,
    build_blocks,
    run_blocks,
    set_attention_form,
    stage_ranges,
)
from mvit.model.positions import resize_absolute
from mvit.model.window import AttentionScope, place_windows

# Shape legend: B batch, L tokens of a grid, row-major, C channels of stage 1, H, W height and width in pixels.


class StagePyramid(nn.Module):
    """Feature maps of images (B, 3, H, W) at strides 4, 8, 16 and 32; build it with `mvit.create_backbone`.

    Args:
        embed_dim, depths, num_heads, mlp_ratio, expand, drop_path, qkv_bias, residual_pooling: as in `MViT`. With
            expand="mlp" a stage's last block has the next stage's channels already, and so have its maps.
        input_size: (H, W) of the pre-training; sets the sizes of the position tables, which are interpolated to
            whatever grid or window there is.
        attention: who sees whom. window_size: side of the windows of stage 1 in tokens, halving per stage.
        kv_stride: pooling stride of keys and values in stage 1, halved with every query stride. The last block of
            stages 2 and 3 pools them twice as much, whatever the attention: where it sees the whole map its cost is
            quadratic (detectron2).
        absolute_positions: one learned vector per token of the pre-training's grid.

    Parameter names are detectron2's. There is no class token, no final norm and no head.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: int,
        mlp_ratio: float,
        input_size: Sequence[int],
        attention: AttentionScope,
        window_size: int,
        expand: Expand,
        kv_stride: int,
        drop_path: Sequence[float],
        relative_positions: bool = True,
        absolute_positions: bool = False,
        residual_pooling: bool = True,
        qkv_bias: bool = True,
        variant: str = "",
    ) -> None:
        super().__init__()
        self.variant = variant
        self.input_size = tuple(input_size)
        self.depths = tuple(depths)
        self.expand: str = expand
        self.attention: str = attention
        self.class_tokens = 0
        self.grid = tuple(size // stride for size, stride in zip(input_size, PATCH_STRIDE[-2:], strict=True))
        self.stages = stage_ranges(depths)
        self._checkpointed: frozenset[int] = frozenset()

        self.patch_embed = PatchEmbed(embed_dim, 2)
        self.pos_embed = None
        if absolute_positions:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = build_blocks(
            embed_dim,
            num_heads,
            mlp_ratio,
            self.stages,
            self.grid,
            expand=expand,
            kv_strides=[
                max(kv_stride // 2**stage, 1) * (2 if stage in (1, 2) and i == blocks.stop - 1 else 1)
                for stage, blocks in enumerate(self.stages.values())
                for i in blocks
            ],
            drop_path=drop_path,
            relative_positions=relative_positions,
            class_token=False,
            qkv_bias=qkv_bias,
            residual_pooling=residual_pooling,
            windows=place_windows(attention, self.stages, window_size),
        )
        self.out_channels: dict[str, int] = {}
        """Channels of every map, {"scale2": …, … "scale5": …}."""
        for stage in range(NUM_STAGES):
            grown = int(expand == "mlp" and stage < NUM_STAGES - 1)
            channels = embed_dim * 2 ** (stage + grown)
            self.out_channels[f"scale{stage + 2}"] = channels
            self.add_module(f"scale{stage + 2}_norm", nn.LayerNorm(channels, eps=LAYER_NORM_EPS))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return {"scale2": (B, C, H/4, W/4), … "scale5": (B, 8C, H/32, W/32)}, sizes rounded up, channels-last.

        `x` are normalised images (B, 3, H, W) of any size. Raises ValueError for anything else.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"a backbone takes images (B, 3, H, W), got a tensor of shape {tuple(x.shape)}")
        x, grid = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resize_absolute(self.pos_embed, self.grid, grid, 0).to(x.dtype)
        maps: dict[str, Tensor] = {}
        for name, blocks in zip(self.out_channels, self.stages.values(), strict=True):
            x, grid = run_blocks(self.blocks, blocks, x, grid, self._checkpointed)
            normed = getattr(self, f"{name}_norm")(x)  # (B, L, channels)
            maps[name] = normed.unflatten(1, grid).permute(0, 3, 1, 2)
        return maps

    def set_activation_checkpointing(self, stages: Collection[str]) -> None:
        """Recompute the blocks of these stages ("stage1" … "stage4") in the backward pass; () turns it off.

        Results, random numbers of drop path included, are unchanged. Raises ValueError for an unknown stage.
        """
        self._checkpointed = blocks_of(stages, self.stages)

    def set_attention_form(self, form: str) -> None:
        """Choose how attention is computed (same function): "auto" per device, "reference", "matmul" or "fused"."""
        set_attention_form(self, form)
