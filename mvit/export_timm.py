"""Our weights as timm's: what timm's MViTv2 can hold, its names, and the model it builds for them."""

from collections.abc import Mapping, Sequence

from torch import nn

from mvit.config import RunConfig
from mvit.model.convert import names_for
from mvit.variants import VARIANTS

_TABLES_OF = 32  # the product of the patch's and the three query strides


def check_timm_has(shapes: Mapping[str, Sequence[int]], config: RunConfig) -> None:
    """Raise ValueError, with the way out, for a model that timm does not have or computes another function for."""
    model, size = config.model, config.image.image_size
    reason = ""
    if config.task == "detection":
        reason = "timm has no detectors"
    elif "patch_embed.proj.weight" not in shapes or len(shapes["patch_embed.proj.weight"]) != 4:
        reason = "timm has no video MViTv2"
    elif "cls_token" in shapes and model.residual_pooling:
        reason = "timm adds the pooled query to the class token as well, so with model.class_token its logits differ"
    elif model.relative_positions and (size[0] != size[1] or size[0] % _TABLES_OF):
        reason = (
            f"timm's relative positions are for squares of multiples of {_TABLES_OF} pixels, image.image_size is {size}"
        )
    elif model.absolute_positions and (size[0] % 4 or size[1] % 4):
        reason = f"timm's absolute positions are for multiples of 4 pixels, image.image_size is {size}"
    if reason:
        raise ValueError(f"format 'timm': {reason}; export as safetensors, torch or facebook (the official names)")


def timm_names(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return {our name: timm's name}."""
    return names_for(shapes, "timm")


def timm_architecture(config: RunConfig) -> str | None:
    """Return the name under which timm builds a run's model, None if it has none."""
    import timm

    model = config.model
    variant = model.resolved_variant()
    published = (
        variant == VARIANTS[model.variant]
        and (model.expand or variant.expand) == variant.expand
        and model.relative_positions
        and model.residual_pooling
        and not model.absolute_positions
        and not model.class_token
    )
    return model.variant if published and timm.is_model(model.variant) else None  # no huge without a class token


def build_timm(config: RunConfig) -> nn.Module:
    """Build timm's model of a run: a published `mvitv2_*` where it is one, else its class with the run's sizes."""
    import timm
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    model, size = config.model, config.image.image_size
    name = timm_architecture(config)
    if name is not None:
        return timm.create_model(name, num_classes=model.num_classes, img_size=size)
    variant = model.resolved_variant()
    expand = model.expand or variant.expand
    sizes = MultiScaleVitCfg(
        depths=variant.depths,
        embed_dim=tuple(variant.embed_dim * 2**stage for stage in range(len(variant.depths))),
        num_heads=tuple(variant.num_heads * 2**stage for stage in range(len(variant.depths))),
        mlp_ratio=variant.mlp_ratio,
        expand_attn=expand == "attention",
        use_cls_token=bool(model.class_token),
        use_abs_pos=model.absolute_positions,
        residual_pooling=model.residual_pooling,
        rel_pos_type="spatial" if model.relative_positions else "",
    )
    return MultiScaleVit(sizes, img_size=size, num_classes=model.num_classes)
