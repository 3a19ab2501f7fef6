"""Parameter groups with the paper's weight-decay exclusions and layer-wise rates, and AdamW or SGD over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.settings import Settings
from mvit.model.block import DropPath
from mvit.model.convert import layer_index


class OptimConfig(Settings):
    """AdamW as the paper uses it (B.2), or SGD as for Something-Something (B.5)."""

    lr: float = Field(default=2.5e-4, gt=0)
    """Peak learning rate for a global batch of `lr_batch_size`; scaled linearly with the global batch."""
    lr_batch_size: int = Field(default=256, gt=0)
    """Global batch size that `lr` is stated for."""
    algorithm: Literal["adamw", "sgd"] = "adamw"
    """"sgd" has Nesterov momentum and adds the weight decay to the gradient."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled decay (sgd: L2); never applied to biases and other one-dimensional parameters."""
    decay_positions: bool = True
    """Decay position tables and the class token too, as the published classification code does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw only, like `eps`."""
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """sgd only."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 does not clip."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer nearer the input learns this factor slower; 1 treats all alike. A detector's pyramid and heads
    count as the layer nearest the output, as a classifier's head does (ViTDet)."""
    freeze: Literal["none", "backbone"] | Annotated[int, Field(gt=0)] = "none"
    """What keeps the weights it starts from: the patch embedding and so many blocks from the input, or "backbone", all
    but the classifier (a linear probe) or a detector's pyramid and heads. Frozen blocks have no drop path."""
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


def freeze(model: nn.Module, config: OptimConfig, *, depth: int) -> None:
    """Take the gradients from the parameters that `config.freeze` names, and drop path from their blocks.

    `depth` is the number of blocks. What is frozen already stays so. Raises ValueError for more blocks than there are.
    """
    if config.freeze == "none":
        return
    if config.freeze != "backbone" and config.freeze > depth:
        raise ValueError(
            f"optim.freeze = {config.freeze}: the model has {depth} blocks; give 1 to {depth}, or backbone"
        )
    last = depth if config.freeze == "backbone" else config.freeze
    for name, parameter in model.named_parameters():
        final_norm = config.freeze == "backbone" and name.startswith("norm.")
        if final_norm or layer_index(name, depth) <= last:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, DropPath) and layer_index(name, depth) <= last:
            module.rate = 0.0


def parameter_groups(model: nn.Module, config: OptimConfig, *, depth: int) -> list[ParameterGroup]:
    """Freeze what `config.freeze` says, and split the trainable parameters into groups, by name and dimension.

    `depth` is the number of blocks. Call before ZeRO touches the model: afterwards a sharded parameter has no shape.
    Raises ValueError if nothing is left to train.
    """
    freeze(model, config, depth=depth)
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


class SGD(torch.optim.SGD):
    """torch's SGD with Nesterov momentum, which also counts its updates, as the checkpoints expect."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update, and count it for each parameter that has a gradient."""
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1)
        return loss


def num_moments(config: OptimConfig) -> int:
    """Return how many numbers the optimizer keeps for each element of a parameter, beside the weight."""
    return 1 if config.algorithm == "sgd" else 2


def build_optimizer(
    model: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """Build torch's AdamW or SGD over `groups`; each torch group carries its `name` for checkpoints."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    over: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.parameter_names],
            "weight_decay": group.weight_decay,
            "lr": 0.0,
            "name": group.name,
        }
        for group in groups
    ]
    if config.algorithm == "sgd":
        return SGD(over, momentum=config.momentum, nesterov=True, fused=fused)
    return torch.optim.AdamW(over, betas=config.betas, eps=config.eps, fused=fused)
