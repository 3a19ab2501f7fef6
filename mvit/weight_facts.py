"""What a state dict in our names is of: sizes, input, head; read off the names and shapes of its tensors alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mvit.model.backbone import PATCH_STRIDE, Expand
from mvit.model.inflation import is_for_images
from mvit.model.positions import square_grid
from mvit.variants import VARIANTS, Variant


@dataclass(frozen=True)
class WeightFacts:
    """The model that weights belong to, as far as they tell: residual pooling and drop path leave no trace."""

    variant: Variant
    """A row of the paper's table, or one of this name's own sizes."""
    published: bool
    """Whether the sizes are those of the paper's table."""
    input_size: tuple[int, ...] | None
    """(H, W) or (T, H, W) that the position tables are for; None if there are none."""
    num_classes: int | None
    """Of the classifier; None without one."""
    expand: Expand
    class_token: bool
    relative_positions: bool
    absolute_positions: bool
    qkv_bias: bool

    @property
    def clips(self) -> bool:
        """Whether it is a model of clips."""
        return self.input_size is not None and len(self.input_size) == 3


def weight_facts(state: Mapping[str, Tensor]) -> WeightFacts:
    """Read the facts off weights in our names (`import_names`).

    Raises ValueError if they lack the patch embedding or a block, without which nothing can be told.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    patch = shapes.get("patch_embed.proj.weight")
    number = sum(name.startswith("blocks.") and name.endswith(".attn.qkv.weight") for name in shapes)
    lost = [f"blocks.{index}" for index in range(number) if f"blocks.{index}.attn.qkv.weight" not in shapes]
    if patch is None or not number or lost:
        what = "patch_embed.proj.weight" if patch is None else lost[0] if lost else "blocks"
        raise ValueError(f"the weights are not those of a whole MViTv2: {what} is missing")
    widths = [shapes[f"blocks.{index}.attn.qkv.weight"][0] // 3 for index in range(number)]
    stages = list(Counter(widths).values())
    if len(stages) != 4 or any(after != 2 * before for before, after in zip(*_pairs(sorted(set(widths))), strict=True)):
        raise ValueError(f"the weights are not those of an MViTv2 of four stages: its blocks are {widths} wide")
    head_dim = shapes.get("blocks.0.attn.pool_q.weight", shapes.get("blocks.0.attn.norm_q.weight", (patch[0],)))[0]
    first = stages[0]  # the first block of stage 2
    expand: Expand = "attention" if shapes[f"blocks.{first}.attn.qkv.weight"][1] == patch[0] else "mlp"
    ratio = shapes["blocks.0.mlp.fc1.weight"][0] / patch[0] if "blocks.0.mlp.fc1.weight" in shapes else 4.0
    size = patch[0], (stages[0], stages[1], stages[2], stages[3]), patch[0] // head_dim
    known = [v for v in VARIANTS.values() if (v.embed_dim, v.depths, v.num_heads, v.mlp_ratio) == (*size, ratio)]
    head = shapes.get("head.projection.weight")
    return WeightFacts(
        variant=known[0] if known else Variant("own sizes", *size, mlp_ratio=ratio),
        published=bool(known),
        input_size=_input_size(shapes, images=is_for_images(state)),
        num_classes=head[0] if head else None,
        expand=expand,
        class_token="cls_token" in shapes,
        relative_positions="blocks.0.attn.rel_pos_h" in shapes,
        absolute_positions=any(name.startswith("pos_embed") for name in shapes),
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )


def _pairs(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return numbers[:-1], numbers[1:]


def _input_size(shapes: Mapping[str, Sequence[int]], *, images: bool) -> tuple[int, ...] | None:
    """Return the input that the first block's tables are for; of absolute positions alone, a square is assumed."""
    axes = "hw" if images else "thw"
    rows = [shapes.get(f"blocks.0.attn.rel_pos_{axis}", (0,))[0] for axis in axes]
    strides = PATCH_STRIDE[-len(axes) :]
    if all(rows):
        return tuple((number + 1) // 2 * stride for number, stride in zip(rows, strides, strict=True))
    if "pos_embed" in shapes and images:
        grid = square_grid(shapes["pos_embed"][1] - ("cls_token" in shapes))
        return None if grid is None else (grid[0] * strides[0], grid[1] * strides[1])
    if "pos_embed_spatial" in shapes and "pos_embed_temporal" in shapes:
        grid = square_grid(shapes["pos_embed_spatial"][1])
        frames = shapes["pos_embed_temporal"][1] * strides[0]
        return None if grid is None else (frames, grid[0] * strides[1], grid[1] * strides[2])
    return None
