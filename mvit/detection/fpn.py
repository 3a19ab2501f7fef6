"""The feature pyramid over a backbone's stage maps, and pooling regions from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from mvit.detection.norm import LayerNorm2d

# Shape legend: B images, C channels, R boxes of a whole batch, S side of a pooled region.

LEVELS = ("scale2", "scale3", "scale4", "scale5")  # of strides 4, 8, 16, 32; regions are pooled from these
LAST_LEVEL = "pool"  # stride 64, for proposals of large objects only; torchvision's name
STRIDES = (4, 8, 16, 32, 64)


class Backbone(Protocol):
    """What a detector needs of a backbone: images (B, 3, H, W) → the maps of `LEVELS`."""

    out_channels: Mapping[str, int]
    """Channels of each level."""

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]: ...


class FeaturePyramid(nn.Module):
    """A backbone and the top-down pyramid on its maps (Lin et al. 2017): five maps of the same channels.

    Images (B, 3, H, W), H and W multiples of 32 → scale2 … scale5 (B, C, H/4, W/4) …, and every other position of
    scale5 as "pool". Raises ValueError if the backbone lacks a level or its out_channels.
    """

    def __init__(self, backbone: nn.Module, channels: int, norm: Literal["none", "layer"] = "none") -> None:
        super().__init__()
        in_channels = getattr(backbone, "out_channels", None)
        if not isinstance(in_channels, Mapping) or any(level not in in_channels for level in LEVELS):
            raise ValueError(
                f"{type(backbone).__name__}.out_channels = {in_channels!r} must give the channels of "
                f"{', '.join(LEVELS)}; `mvit.create_backbone` builds such a backbone"
            )
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(
            [in_channels[level] for level in LEVELS],
            channels,
            LastLevelMaxPool(),
            norm_layer=LayerNorm2d if norm == "layer" else None,
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        return self.fpn({level: maps[level] for level in LEVELS})


@dataclass(frozen=True)
class Pyramid:
    """The maps of a batch as the heads read them.

    maps: by level, (B, C, h, w), fp32 for pooling. dtype: what the heads compute in. sizes: (H, W) of each image
    without its padding.
    """

    maps: Mapping[str, Tensor]
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]


class RegionPool(nn.Module):
    """Cut regions out of the pyramid: boxes, per image (N, 4) → (R, C, S, S), each from the level of its size.

    In fp32 (coordinates in bf16 would be off by pixels); the result has the pyramid's dtype. The level is
    4 + log2(√area / 224) (Lin et al. 2017, equation 1).
    """

    def __init__(self, size: int, *, aligned: bool, sampling_ratio: int) -> None:
        super().__init__()
        self.size, self.aligned, self.sampling_ratio = size, aligned, sampling_ratio
        self._level = LevelMapper(2, 5)

    def forward(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        image = torch.cat([box.new_full((len(box), 1), index) for index, box in enumerate(boxes)])
        regions = torch.cat((image, torch.cat(list(boxes))), dim=1)  # (R, 5)
        levels = self._level(list(boxes))
        cuts, order = [], []
        for index, (name, stride) in enumerate(zip(LEVELS, STRIDES, strict=False)):
            here = torch.where(levels == index)[0]  # may be empty; the map still needs its gradient of zero
            cuts.append(
                roi_align(
                    pyramid.maps[name],
                    regions[here],
                    self.size,
                    1 / stride,
                    self.sampling_ratio,
                    aligned=self.aligned,
                )
            )
            order.append(here)
        return torch.cat(cuts)[torch.argsort(torch.cat(order))].to(pyramid.dtype)  # (R, C, S, S)
