"""The published models: the table of variants, and what builds any of them as a classifier or as a backbone."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mvit.model.attention import AttentionForm
from mvit.model.backbone import NUM_STAGES, AbsolutePositions, Expand, MViT, RelativePositions, set_drop_path_mode
from mvit.model.block import DropPathMode
from mvit.model.heads import READOUTS, Readout
from mvit.model.inflation import Inflation
from mvit.model.pyramid import StagePyramid
from mvit.model.window import ATTENTION_SCOPES, AttentionScope
from mvit.weights import load_weights


@dataclass(frozen=True)
class Variant:
    """The size of a model, with what was published for training it on ImageNet-1K."""

    name: str
    embed_dim: int
    """Channels of stage 1; doubled in every later stage."""
    depths: tuple[int, int, int, int]
    """Blocks per stage."""
    num_heads: int
    """Heads of stage 1; doubled in every later stage."""
    expand: Expand = "attention"
    """Where the published ImageNet-1K image model grows its channels."""
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    """Stochastic depth rate of the last block, ImageNet-1K (paper, appendix B.2)."""
    weight_decay: float = 0.05
    """AdamW weight decay, ImageNet-1K from scratch (paper, appendix B.2)."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)


# Paper Table 1 and appendix B.2. Large grows its channels in the MLP: so the released ImageNet-1K weights (218 M);
# the paper's 42.1 GFLOPs and the ImageNet-21K weights belong to the other large, expand="attention" (213.6 M).
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("mvitv2_tiny", 96, (1, 2, 5, 2), 1, drop_path=0.1),
        Variant("mvitv2_small", 96, (1, 2, 11, 2), 1, drop_path=0.1),
        Variant("mvitv2_base", 96, (2, 3, 16, 3), 1, drop_path=0.3),
        Variant("mvitv2_large", 144, (2, 6, 36, 4), 2, expand="mlp", drop_path=0.5, weight_decay=0.1),
        Variant("mvitv2_huge", 192, (4, 8, 60, 8), 3, drop_path=0.8, weight_decay=0.1),
    )
}


def find_variant(name: str) -> Variant:
    """Return the variant of this name; raise ValueError with the nearest name and the list if there is none."""
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown variant {name!r}.{hint} The variants are: {', '.join(VARIANTS)}.")


def create_model(
    variant: str | Variant,
    num_classes: int = 1000,
    input_size: Sequence[int] = (224, 224),
    class_token: bool | None = None,
    expand: Expand | None = None,
    drop_path: float | Sequence[float] = 0.0,
    weights: str | Path | Mapping[str, object] | None = None,
    *,
    allow_new_head: bool = False,
    readout: Readout | None = None,
    relative_positions: RelativePositions = True,
    absolute_positions: AbsolutePositions = False,
    residual_pooling: bool = True,
    qkv_bias: bool = True,
    kv_stride: int | None = None,
    head_dropout: float = 0.0,
    attention_form: AttentionForm = "auto",
    drop_path_mode: DropPathMode = "auto",
    inflation: Inflation = "centre",
) -> MViT:
    """Build an MViTv2 classifier: (B, 3, H, W) or (B, 3, T, H, W) floats → (B, num_classes) logits.

    Args:
        variant: a name of the paper's Table 1 ("mvitv2_tiny" … "mvitv2_huge") or a `Variant` of your own.
        input_size: (H, W) for images, (T, H, W) for clips. Other sizes of the same kind run too, with interpolated
            position tables; this one decides how many rows the tables have.
        class_token: None: no for images, yes for clips (as published).
        expand: where channels grow, "attention" or "mlp". None: as published, the variant's for images and
            "attention" for clips.
        drop_path: a rate that grows linearly over the blocks from 0, or four, one for the blocks of each stage.
        weights: a file or a state dict for `load_weights`; `allow_new_head` and `inflation` as there.
        readout: None: "class_token" where there is one, else "mean"; or "mean_then_norm".
        relative_positions, absolute_positions, residual_pooling, kv_stride: the paper's ablations (Tables 4, 6, 7,
            A.6); kv_stride None: 4 for images, 8 for clips.
        attention_form: how attention is computed, never what: see `MViT.set_attention_form`.
        drop_path_mode: how samples are dropped, never how often: "mask" computes and zeroes them, "skip" leaves them
            out of the branch's batch (needs no device synchronisation, but batches vary), "auto": "skip" on the CPU.

    Raises ValueError, naming the argument and what it may be.
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    video = len(input_size) == 3
    class_token = video if class_token is None else class_token
    expand = expand or ("attention" if video else variant.expand)
    readout = readout or ("class_token" if class_token else "mean")
    _check_variant(variant)
    _check_input_size(input_size)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    _check_choice("expand", expand, get_args(Expand))
    _check_choice("readout", readout, READOUTS)
    if readout == "class_token" and not class_token:
        raise ValueError('readout="class_token" needs class_token=True; without one use readout="mean"')
    _check_choice("relative_positions", relative_positions, (True, False, "spatial", "temporal"))
    _check_choice("absolute_positions", absolute_positions, (True, False, "separable"))
    if not video and (relative_positions == "temporal" or absolute_positions == "separable"):
        raise ValueError(
            'relative_positions="temporal" and absolute_positions="separable" are for clips: give input_size=(T, H, W)'
        )
    if kv_stride is not None and kv_stride < 1:
        raise ValueError(f"kv_stride={kv_stride} must be at least 1")
    if not 0.0 <= head_dropout < 1.0:
        raise ValueError(f"head_dropout={head_dropout} must be in [0, 1)")
    model = MViT(
        embed_dim=variant.embed_dim,
        depths=variant.depths,
        num_heads=variant.num_heads,
        mlp_ratio=variant.mlp_ratio,
        num_classes=num_classes,
        input_size=tuple(input_size),
        class_token=class_token,
        readout=readout,
        expand=expand,
        kv_stride=kv_stride or (8 if video else 4),
        drop_path=drop_path_rates(drop_path, variant.depths),
        relative_positions=relative_positions,
        absolute_positions=absolute_positions,
        residual_pooling=residual_pooling,
        qkv_bias=qkv_bias,
        head_dropout=head_dropout,
        variant=variant.name,
    )
    model.set_attention_form(attention_form)
    set_drop_path_mode(model, drop_path_mode)
    if weights is not None:
        load_weights(model, weights, allow_new_head=allow_new_head, inflation=inflation)
    return model


def create_backbone(
    variant: str | Variant,
    hybrid_window: bool = True,
    expand: Expand = "attention",
    weights: str | Path | Mapping[str, object] | None = None,
    *,
    attention: AttentionScope | None = None,
    window_size: int = 56,
    drop_path: float | Sequence[float] = 0.0,
    input_size: Sequence[int] = (224, 224),
    relative_positions: bool = True,
    absolute_positions: bool = False,
    residual_pooling: bool = True,
    qkv_bias: bool = True,
    kv_stride: int = 4,
    attention_form: AttentionForm = "auto",
    drop_path_mode: DropPathMode = "auto",
) -> StagePyramid:
    """Build an MViTv2 backbone: (B, 3, H, W), any H, W → {"scale2": (B, C, H/4, W/4), … "scale5": (B, 8C, H/32, W/32)}.

    Every map has its own norm; `out_channels` tells the channels of each.

    Args:
        variant: a name of the paper's Table 1 or a `Variant` of your own.
        hybrid_window: attention within windows but for the last block of stages 2, 3 and 4 (Hwin, §4.2); False: full
            pooling attention.
        expand: where channels grow. With "mlp", as in the large model of ImageNet-1K, the maps are of the channels
            that a stage ends with: 2C, 4C, 8C, 8C.
        weights: for `load_weights`: a detectron2 backbone or detector, or any image classifier.
        attention: in place of `hybrid_window`, the paper's ablation (Table 4): "hwin", "window", "swin" or "full".
        window_size: side of stage 1's windows in tokens, halved with every stage.
        drop_path: a rate that grows linearly over the blocks from 0, or four, one for the blocks of each stage.
        input_size: (H, W) of the pre-training, which decides how many rows the position tables have.
        relative_positions, absolute_positions, residual_pooling, kv_stride: ablations (Tables 4, 6, 7).

    Raises ValueError, naming the argument and what it may be.
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    _check_variant(variant)
    _check_input_size(input_size)
    if len(input_size) != 2:
        raise ValueError(f"input_size={tuple(input_size)} must be (H, W): a backbone is for images")
    _check_choice("expand", expand, get_args(Expand))
    _check_choice("hybrid_window", hybrid_window, (True, False))
    _check_choice("attention", attention, (None, *ATTENTION_SCOPES))
    if attention == "hwin" and not hybrid_window:
        raise ValueError('hybrid_window=False contradicts attention="hwin"; give one of the two')
    _check_choice("relative_positions", relative_positions, (True, False))
    _check_choice("absolute_positions", absolute_positions, (True, False))
    if kv_stride < 1:
        raise ValueError(f"kv_stride={kv_stride} must be at least 1")
    backbone = StagePyramid(
        embed_dim=variant.embed_dim,
        depths=variant.depths,
        num_heads=variant.num_heads,
        mlp_ratio=variant.mlp_ratio,
        input_size=tuple(input_size),
        attention=attention or ("hwin" if hybrid_window else "full"),
        window_size=window_size,
        expand=expand,
        kv_stride=kv_stride,
        drop_path=drop_path_rates(drop_path, variant.depths),
        relative_positions=relative_positions,
        absolute_positions=absolute_positions,
        residual_pooling=residual_pooling,
        qkv_bias=qkv_bias,
        variant=variant.name,
    )
    backbone.set_attention_form(attention_form)
    set_drop_path_mode(backbone, drop_path_mode)
    if weights is not None:
        load_weights(backbone, weights)
    return backbone


def drop_path_rates(drop_path: float | Sequence[float], depths: Sequence[int]) -> list[float]:
    """Return the drop-path rate of every block: linear from 0 to one rate, or one rate for each stage.

    Raises ValueError for a rate outside [0, 1) or a number of rates other than the number of stages.
    """
    per_stage = list(drop_path) if isinstance(drop_path, Sequence) else None
    rates = [drop_path] if isinstance(drop_path, (int, float)) else list(drop_path)
    if per_stage is not None and len(per_stage) != len(depths):
        raise ValueError(f"drop_path={per_stage} must be one rate or {len(depths)}, one for each stage")
    if not all(0.0 <= rate < 1.0 for rate in rates):
        raise ValueError(f"drop_path={drop_path} must be in [0, 1)")
    if per_stage is not None:
        return [rate for rate, depth in zip(per_stage, depths, strict=True) for _ in range(depth)]
    last = max(sum(depths) - 1, 1)
    return [rates[0] * i / last for i in range(sum(depths))]


def _check_variant(variant: Variant) -> None:
    if len(variant.depths) != NUM_STAGES or min(variant.depths) < 1:
        raise ValueError(f"depths={variant.depths} must be {NUM_STAGES} numbers of blocks, each at least 1")
    if variant.num_heads < 1 or variant.embed_dim < 1 or variant.embed_dim % variant.num_heads:
        raise ValueError(f"embed_dim={variant.embed_dim} must be a positive multiple of num_heads={variant.num_heads}")
    if variant.mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio={variant.mlp_ratio} must be positive")


def _check_input_size(input_size: Sequence[int]) -> None:
    if not isinstance(input_size, Sequence):
        raise ValueError(f"input_size={input_size!r} must be (H, W) for images or (T, H, W) for clips: (224, 224)")
    smallest = (2, 4, 4)[-len(input_size) :]
    if len(input_size) not in (2, 3) or any(a < b for a, b in zip(input_size, smallest, strict=True)):
        raise ValueError(
            f"input_size={tuple(input_size)} must be (H, W) for images or (T, H, W) for clips, "
            "with at least one patch: H and W ≥ 4, T ≥ 2"
        )


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(repr(choice) for choice in choices)}")
