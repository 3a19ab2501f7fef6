"""Other libraries' MViTv2 models, for measuring ours beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from mvit.variants import Variant, find_variant


def published_classes(input_size: Sequence[int]) -> int:
    """Return the classes of what is published: ImageNet-1K's for images, Kinetics-400's for clips."""
    return 400 if len(input_size) == 3 else 1000


def _timm_model(variant: str, input_size: tuple[int, ...]) -> nn.Module:
    import timm

    return timm.create_model(variant, img_size=input_size)


def torchvision_model(variant: str | Variant, input_size: tuple[int, ...]) -> nn.Module:
    """Build torchvision's MViTv2 in a variant's size; for small at 16x224x224 that is its `mvit_v2_s`.

    Without stochastic depth, as ours; its head's dropout is no matter.
    """
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    row = find_variant(variant) if isinstance(variant, str) else variant
    frames, *side = input_size
    settings: list[MSBlockConfig] = []
    width = row.embed_dim
    for stage, blocks in enumerate(row.depths):
        for block in range(blocks):
            q_step, kv_step = 2 if stage and not block else 1, max(8 // 2**stage, 1)
            out = row.embed_dim * 2**stage
            settings.append(
                MSBlockConfig(
                    row.num_heads * 2**stage, width, out, [3] * 3, [3] * 3, [1, q_step, q_step], [1, kv_step, kv_step]
                )
            )
            width = out
    return MViT(
        spatial_size=(side[0], side[1]),
        temporal_size=frames,
        block_setting=settings,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=published_classes(input_size),
    )


@dataclass(frozen=True)
class Peer:
    """Another library's models."""

    axes: int
    """2 if they are for images, 3 for clips."""
    build: Callable[[str, tuple[int, ...]], nn.Module]


PEERS: dict[str, Peer] = {"timm": Peer(2, _timm_model), "torchvision": Peer(3, torchvision_model)}
