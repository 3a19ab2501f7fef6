"""Parameter groups with the paper's weight-decay exclusions and layer-wise rates, and AdamW over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.settings import Settings
from mvit.model.convert import layer_index


class OptimConfig(Settings):
    """AdamW as the paper uses it (B.2)."""

    lr: float = Field(default=2.5e-4, gt=0)
    """Peak learning rate for a global batch of `lr_batch_size`; scaled linearly with the global batch."""
    lr_batch_size: int = Field(default=256, gt=0)
    """Global batch size that `lr` is stated for."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled decay; never applied to biases and other one-dimensional parameters."""
    decay_positions: bool = True
    """Decay position tables and the class token too, as the published classification code does."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 does not clip."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer nearer the input learns this factor slower; 1 treats all alike."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the fp32 weights with this decay per step."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share weight decay and learning-rate scale; `name` identifies the group in checkpoints."""

    name: str
    parameter_names: tuple[str, ...]
    weight_decay: float
    lr_scale: float


def _is_position(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf.startswith(("rel_pos", "pos_embed")) or leaf == "cls_token"


def parameter_groups(model: nn.Module, config: OptimConfig, *, depth: int) -> list[ParameterGroup]:
    """Split the trainable parameters into groups, by name and dimension.

    `depth` is the number of blocks. Call before ZeRO touches the model: afterwards a sharded parameter has no shape.
    """
    members: dict[tuple[bool, int], list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and (config.decay_positions or not _is_position(name))
        layer = layer_index(name, depth) if config.layer_decay < 1 else depth + 1
        members.setdefault((decayed, layer), []).append(name)
    if not members:
        raise ValueError("the model has no trainable parameter; unfreeze something to train")
    groups = []
    for (decayed, layer), names in sorted(members.items()):
        label = "decay" if decayed else "no_decay"
        groups.append(
            ParameterGroup(
                name=label if config.layer_decay == 1 else f"{label}_layer{layer:03d}",
                parameter_names=tuple(names),
                weight_decay=config.weight_decay if decayed else 0.0,
                lr_scale=config.layer_decay ** (depth + 1 - layer),
            )
        )
    return groups


def build_adamw(
    model: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig, *, fused: bool
) -> torch.optim.AdamW:
    """Build torch's AdamW over `groups`; each torch group carries its `name` for checkpoints."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.parameter_names],
                "weight_decay": group.weight_decay,
                "lr": 0.0,
                "name": group.name,
            }
            for group in groups
        ],
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )
