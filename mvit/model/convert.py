"""Parameter names: published checkpoints (official, SlowFast, timm, torchvision, detectron2) ↔ ours; table sizes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from mvit.model.positions import resize_absolute, resize_table, square_grid

# Our names are those of facebookresearch/mvit and SlowFast ("official"). Rules for the others: (their part, our part),
# the first that occurs in a name is applied, in either direction.
Naming = Literal["official", "timm", "torchvision", "detectron2", "detector"]
_TIMM = ((".shortcut_proj_attn.", ".proj."), (".shortcut_proj_mlp.", ".proj."), ("head.fc.", "head.projection."))
_TORCHVISION = (
    ("conv_proj.", "patch_embed.proj."),
    ("pos_encoding.class_token", "cls_token"),
    ("pos_encoding.spatial_pos", "pos_embed_spatial"),
    ("pos_encoding.temporal_pos", "pos_embed_temporal"),
    ("pos_encoding.class_pos", "pos_embed_class"),
    (".attn.project.0.", ".attn.proj."),
    (".attn.pool_q.pool.", ".attn.pool_q."),
    (".attn.pool_k.pool.", ".attn.pool_k."),
    (".attn.pool_v.pool.", ".attn.pool_v."),
    (".attn.pool_q.norm_act.0.", ".attn.norm_q."),
    (".attn.pool_k.norm_act.0.", ".attn.norm_k."),
    (".attn.pool_v.norm_act.0.", ".attn.norm_v."),
    (".project.", ".proj."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("head.1.", "head.projection."),
)
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_TIMM_BLOCK = re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.")
# detectron2: our names behind a prefix (a detector's or an FPN's), beside the detector's other parts
_DETECTRON2 = re.compile(r"^(?:backbone\.)?bottom_up\.")
_PYRAMID_NORM = re.compile(r"^scale[2-5]_norm\.")
# our own detectors, and the pyramid alone: our names behind a prefix, too
_DETECTOR = re.compile(r"^(?:pyramid\.)?backbone\.(?=(?:patch_embed|pos_embed|blocks|scale[2-5]_norm)\b)")
_DETECTOR_PART = re.compile(
    r"^(?:backbone\.|pyramid\.)?(scale[2-5]_norm|fpn|top_block|proposal_generator|roi_heads|sem_seg_head|pixel_mean"
    r"|pixel_std|rpn|box_heads|mask_branch)(?![a-z])"
)


def layer_index(name: str, depth: int) -> int:
    """Return the layer of a parameter for layer-wise learning-rate decay.

    0: patch embedding, class token, positions; 1 … depth: the blocks; depth + 1: final norm and head, or the norms of
    a backbone's maps and whatever else a detector has (pyramid and heads, as in ViTDet).
    Raises ValueError for a name that is none of these.
    """
    name = _DETECTOR.sub("", name)
    block = _BLOCK.match(name)
    if block and int(block[1]) < depth:
        return int(block[1]) + 1
    if name.startswith(("norm.", "head.")) or detector_part(name):
        return depth + 1
    if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
        return 0
    raise ValueError(f"parameter {name!r} belongs to no layer of a model of {depth} blocks")


def detect_naming(names: Iterable[str]) -> Naming:
    """Tell whose parameter names these are; raise ValueError, showing some of them, if nobody's known here."""
    names = list(names)
    if any(_DETECTRON2.match(name) or _PYRAMID_NORM.match(name) for name in names):
        return "detectron2"
    if any(_DETECTOR.match(name) for name in names):
        return "detector"
    if any(_TIMM_BLOCK.match(name) for name in names):
        return "timm"
    if "conv_proj.weight" in names:
        return "torchvision"
    if any(name.startswith("patch_embed.proj.") or _BLOCK.match(name) for name in names):
        return "official"
    shown = ", ".join(names[:8]) or "no tensors at all"
    raise ValueError(
        f"these are not MViTv2 weights in a naming known here ({', '.join(get_args(Naming))}); they hold: {shown}"
    )


def import_names(state: Mapping[str, Tensor]) -> tuple[Naming, dict[str, Tensor]]:
    """Rename a state dict to our names; return whose names it had, and the new dict.

    What a detector has beside the backbone keeps its names: see `detector_part`. Raises ValueError if the naming is
    not known or two entries become one.
    """
    naming = detect_naming(state)
    if naming == "official":
        return naming, dict(state)
    rules = {"timm": _TIMM, "torchvision": _TORCHVISION}.get(naming, ())
    prefix = {"detectron2": _DETECTRON2, "detector": _DETECTOR}.get(naming)
    depths = _timm_depths(state) if naming == "timm" else []
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = prefix.sub("", name) if prefix else name
        block = _TIMM_BLOCK.match(name)
        if naming == "timm" and block:
            index = sum(depths[: int(block[1])]) + int(block[2])
            ours = f"blocks.{index}.{name[block.end() :]}"
        for their_part, our_part in rules:
            if their_part in ours:
                ours = ours.replace(their_part, our_part)
                break
        if ours in renamed:
            raise ValueError(f"two entries of the {naming} weights stand for {ours!r}; one of them is {name!r}")
        renamed[ours] = tensor
    return naming, renamed


def detector_part(name: str) -> str | None:
    """Return the part of a detector, ours or detectron2's, that a tensor belongs to, "roi_heads" for one.

    None for the backbone proper and for what is not known. The norms of a bare backbone's maps, which every detector
    trains anew, are a part.
    """
    found = _DETECTOR_PART.match(name)
    return found[1] if found else None


def is_pyramid_norm(name: str) -> bool:
    """Tell whether a parameter, in our names, is of the norm of one of a backbone's maps."""
    return _PYRAMID_NORM.match(name) is not None


def export_names(state: Mapping[str, Tensor], naming: Literal["official", "timm"]) -> dict[str, Tensor]:
    """Rename our state dict for other code: "official" is the content of a checkpoint's `model_state`.

    Raises ValueError as `names_for` does.
    """
    names = names_for({name: tensor.shape for name, tensor in state.items()}, naming)
    return {names[name]: tensor for name, tensor in state.items()}


def names_for(shapes: Mapping[str, Sequence[int]], naming: Literal["official", "timm"]) -> dict[str, str]:
    """Return {our name: the other code's name}; stages and the place of channel growth are read from the shapes.

    Raises ValueError for clips in timm's naming, which timm does not have, and for an unknown naming.
    """
    if naming == "official":
        return {name: name for name in shapes}
    if naming != "timm":
        raise ValueError(f"naming={naming!r} must be 'official' or 'timm'")
    if len(shapes["patch_embed.proj.weight"]) != 4:
        raise ValueError("timm has no video MViTv2: export these weights with the official names")
    places = _timm_places(shapes)
    names: dict[str, str] = {}
    for name in shapes:
        block = _BLOCK.match(name)
        theirs = name.replace("head.projection.", "head.fc.")
        if block:
            index = int(block[1])
            rest = name[block.end() :]
            if rest.startswith("proj."):
                dim = shapes[f"blocks.{index}.attn.qkv.weight"]
                rest = rest.replace("proj.", "shortcut_proj_mlp." if dim[0] == 3 * dim[1] else "shortcut_proj_attn.")
            theirs = f"{places[index]}.{rest}"
        names[name] = theirs
    return names


def fit_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], grid: Sequence[int], class_tokens: int
) -> tuple[Tensor, bool] | None:
    """Give a checkpoint's tensor the shape of our parameter `name`, if that is a change of layout or of resolution.

    Returns (tensor, whether values were interpolated), or None if the two do not belong together. Convolutions with a
    time axis of 1 lose it; relative tables and absolute positions are interpolated. A checkpoint does not tell the
    grid of its absolute positions: a square one is assumed, and for clips the model's own number of frames. The row of
    a class token that the model does not have is cut off them (detectron2), which counts as interpolated.
    """
    shape = tuple(shape)
    if tensor.ndim == 5 and len(shape) == 4 and tensor.shape[2] == 1:
        tensor = tensor.squeeze(2)
    if name.startswith(("cls_token", "pos_embed")):
        tensor = tensor.reshape((1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape))
    if tuple(tensor.shape) == shape:
        return tensor, False
    leaf = name.rsplit(".", 1)[-1]
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return None
    if leaf.startswith("rel_pos_"):
        return resize_table(tensor.float(), shape[0]), True
    if leaf == "pos_embed_temporal":
        return resize_table(tensor[0].float(), shape[1])[None], True
    if leaf == "pos_embed" and not class_tokens and len(grid) == 2 and square_grid(tensor.shape[1]) is None:
        without = tensor[:, 1:]
        if without.shape[1] == shape[1]:
            return without, True
        tensor = tensor if square_grid(without.shape[1]) is None else without
    if leaf in ("pos_embed", "pos_embed_spatial"):
        extra = class_tokens if leaf == "pos_embed" else 0
        new = tuple(grid) if leaf == "pos_embed" else tuple(grid[-2:])
        frames = new[:-2]  # () or (T,)
        tokens, rest = divmod(tensor.shape[1] - extra, frames[0] if frames else 1)
        square = square_grid(tokens)
        if rest == 0 and square is not None and tokens > 0:
            return resize_absolute(tensor.float(), (*frames, *square), new, extra), True
    return None


def _timm_depths(names: Iterable[str]) -> list[int]:
    """Count the blocks of each stage in timm's names."""
    last: dict[int, int] = {}
    for name in names:
        if block := _TIMM_BLOCK.match(name):
            stage, index = int(block[1]), int(block[2])
            last[stage] = max(last.get(stage, 0), index)
    return [last.get(stage, -1) + 1 for stage in range(max(last) + 1)]


def _timm_places(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return "stages.s.blocks.j" for every block: within a stage the attention width is constant, then it doubles."""
    places: list[str] = []
    stage, first, width = -1, 0, 0
    for index in range(sum(name.endswith(".attn.qkv.weight") for name in shapes)):
        rows = shapes[f"blocks.{index}.attn.qkv.weight"][0]
        if rows != width:
            stage, first, width = stage + 1, index, rows
        places.append(f"stages.{stage}.blocks.{index - first}")
    return places
