"""Other MViTv2 models, of other libraries or of the user, for measuring ours beside them."""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mvit.model.backbone import MViT, set_drop_path_mode
from mvit.variants import Variant, create_model, find_variant


def published_classes(input_size: Sequence[int]) -> int:
    """Return the classes of what is published: ImageNet-1K's for images, Kinetics-400's for clips."""
    return 400 if len(input_size) == 3 else 1000


def _timm_model(variant: str, input_size: tuple[int, ...], drop_path: float) -> nn.Module:
    import timm

    return timm.create_model(variant, img_size=input_size, drop_path_rate=drop_path)


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


def _reference_model(variant: str, input_size: tuple[int, ...], drop_path: float) -> nn.Module:
    model = create_model(variant, published_classes(input_size), input_size, drop_path=drop_path)
    model.set_attention_form("reference")
    set_drop_path_mode(model, "mask")
    return model


@dataclass(frozen=True)
class Peer:
    """Other models, ready to be built."""

    axes: tuple[int, ...]
    """2 if they are for images, 3 for clips."""
    build: Callable[[str, tuple[int, ...], float], nn.Module]
    """(variant, input size, drop-path rate) → the model."""


PEERS: dict[str, Peer] = {
    "timm": Peer((2,), _timm_model),
    "torchvision": Peer((3,), lambda variant, size, _: torchvision_model(variant, size)),
    "reference": Peer((2, 3), _reference_model),
}


def fitting_peers(input_size: Sequence[int], wanted: Sequence[str] | None) -> dict[str, Peer]:
    """Return the wanted peers (None: the libraries) that have models for images (H, W) or for clips (T, H, W).

    Raises ValueError for an unknown peer, or if none of those wanted is for such inputs.
    """
    axes = len(input_size)
    if wanted is None:
        return {name: peer for name, peer in PEERS.items() if axes in peer.axes and name != "reference"}
    peers = {name.partition("=")[0]: _own_peer(name) if "=" in name else _known_peer(name) for name in wanted}
    fits = {name: peer for name, peer in peers.items() if axes in peer.axes}
    if peers and not fits:
        kind, text = "clips" if axes == 3 else "images", "x".join(map(str, input_size))
        others = ", ".join(name for name, peer in PEERS.items() if axes in peer.axes)
        raise ValueError(f"{', '.join(peers)} has no MViTv2 for {kind} ({text}); measure against {others}")
    return fits


def recompute(model: nn.Module, whether: bool) -> bool:
    """Switch the recomputation of every block in the backward pass; return False if the model cannot do it."""
    if isinstance(model, MViT):
        model.set_activation_checkpointing(list(model.stages) if whether else ())
        return True
    switch = getattr(model, "set_grad_checkpointing", None)  # timm's
    if switch is not None:
        switch(whether)
    return switch is not None or not whether


def _known_peer(name: str) -> Peer:
    if name not in PEERS:
        raise ValueError(f"cannot bench {name!r}; choose from {list(PEERS)}, or give NAME=FILE.py:FUNCTION")
    return PEERS[name]


def _own_peer(text: str) -> Peer:
    """Read NAME=FILE.py:FUNCTION: a model of the user's, such as the official code's, which is not ours to ship."""
    path, _, function = text.partition("=")[2].rpartition(":")
    if not Path(path).is_file() or not function:
        raise ValueError(f"{text!r} must be NAME=FILE.py:FUNCTION, with a FUNCTION(variant, input_size) in that file")
    build = runpy.run_path(path).get(function)
    if not callable(build):
        raise ValueError(f"{path} has no function {function!r}, which {text!r} names")

    def checked(variant: str, input_size: tuple[int, ...], _: float) -> nn.Module:
        model = build(variant, input_size)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{text!r} must return a torch module, not {type(model).__name__}")
        return model

    return Peer((2, 3), checked)
