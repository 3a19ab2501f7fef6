"""Image weights for clips: what becomes of each tensor (MViTv2 §4.3, and SlowFast's other way)."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Inflation = Literal["centre", "repeat"]
"""How a 2-D filter gets a time axis. "centre": it stands in the centre frame and the others are zero, so that a clip is
first seen frame by frame (the paper, §4.3). "repeat": it stands in every frame, *not* divided by their number, so that
a still clip's patches are the picture's times the frames (SlowFast's code)."""
INFLATIONS: tuple[str, ...] = get_args(Inflation)


def is_for_images(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights in our names are an image model's; some are stored with a time axis of 1."""
    patch = state.get("patch_embed.proj.weight")
    return patch is not None and _without_time(patch).ndim == 4


def inflate_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], inflation: Inflation
) -> tuple[dict[str, Tensor], list[str]]:
    """Give the convolutions of image weights the time axis that `wanted`, a video model's parameters, have.

    Returns the new weights, and the names of what was inflated. Raises ValueError for absolute positions, for which
    neither source says what their inflation is.
    """
    positions = [name for name in state if name.startswith("pos_embed")]
    if positions:
        raise ValueError(
            f"image weights with absolute positions ({', '.join(positions)}) cannot be inflated to clips; start from "
            "weights trained without them, as published"
        )
    inflated: dict[str, Tensor] = {}
    for name, tensor in state.items():
        picture = _without_time(tensor)
        if name in wanted and wanted[name].ndim == 5 and picture.ndim == 4:
            inflated[name] = inflate(picture, wanted[name].shape[2], inflation)
    return {**state, **inflated}, list(inflated)


def inflate(kernel: Tensor, frames: int, inflation: Inflation) -> Tensor:
    """Give a filter (O, I, kh, kw) a time axis: (O, I, frames, kh, kw)."""
    clip = kernel.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    if inflation == "repeat":
        return clip
    centre = torch.zeros_like(clip, memory_format=torch.contiguous_format)
    centre[:, :, frames // 2] = kernel
    return centre


def starts_anew(name: str) -> bool:
    """Tell whether a video model has this parameter and image weights need not: class token, temporal positions."""
    return name == "cls_token" or name.endswith(".rel_pos_t")


def _without_time(tensor: Tensor) -> Tensor:
    return tensor.squeeze(2) if tensor.ndim == 5 and tensor.shape[2] == 1 else tensor
