"""Anchors and the region proposal network (Ren et al. 2015), on five pyramid levels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mvit.detection.boxes import Target
from mvit.detection.config import DetectionConfig
from mvit.detection.fpn import STRIDES

FOREGROUND_IOU, BACKGROUND_IOU = 0.7, 0.3


class PyramidAnchors(AnchorGenerator):
    """Anchors of detectron2: centred on multiples of the level's stride, not rounded to pixels, always fp32.

    torchvision's own are rounded, take the maps' dtype (bf16 is off by whole pixels) and derive strides from the
    sizes of maps, which is wrong for the last level where its map has an odd number of rows.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the anchors around the origin, (sizes x ratios, 4)."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        stretch = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sides / stretch[:, None]).flatten(), (sides * stretch[:, None]).flatten()
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], steps))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's head with its outputs in fp32: all that follows, decoding, losses, suppression, is fp32 too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network with the loss of the boxes as published: L1 (its own turns quadratic below 1/9)."""

    def __init__(self, config: DetectionConfig, num_convs: int) -> None:
        anchors = PyramidAnchors(config.anchor_sizes, config.anchor_ratios)
        after = config.proposals_after_nms
        super().__init__(
            anchors,
            ProposalHead(config.pyramid_channels, anchors.num_anchors_per_location()[0], num_convs),
            FOREGROUND_IOU,
            BACKGROUND_IOU,
            config.proposal_batch_size,
            0.5,
            {"training": config.proposals_before_nms, "testing": config.proposals_before_nms_test},
            {"training": after, "testing": after},
            config.proposal_nms_iou,
        )
        self._beta = config.box_loss_beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes, both averaged over the sampled anchors of the batch."""
        positive, negative = (torch.where(torch.cat(drawn))[0] for drawn in self.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))
        wanted = torch.cat(regression_targets)[positive]
        count = max(len(sampled), 1)
        boxes = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted, beta=self._beta, reduction="sum") / count
        logits, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / count, boxes


def propose(
    network: nn.Module,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    maps: dict[str, Tensor],
    targets: Sequence[Target] | None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the proposals of each image, (N, 4) fp32 clipped to its size (H, W), and in training their losses."""
    truth = None if targets is None else [{"boxes": target.boxes} for target in targets]
    proposals, losses = network(ImageList(images, list(sizes)), maps, truth)
    if targets is None:
        return proposals, {}
    return proposals, {"rpn_objectness": losses["loss_objectness"], "rpn_box": losses["loss_rpn_box_reg"]}
