"""Mask R-CNN and Cascade Mask R-CNN on a feature pyramid: assembled, trained and asked."""

from collections.abc import Sequence
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from mvit.detection.boxes import Target, training_targets
from mvit.detection.candidates import Candidates, select
from mvit.detection.cascade import CascadeHeads
from mvit.detection.config import DetectionConfig, DetectorKind
from mvit.detection.detections import Detections
from mvit.detection.fpn import LEVELS, FeaturePyramid, Pyramid
from mvit.detection.mask_rcnn import BoxHeads, MaskBranch, training_boxes
from mvit.detection.proposals import ProposalNetwork, propose

DIVISIBILITY = 32  # images are padded to multiples, so that every level has exactly its stride


class Detector(nn.Module):
    """A detector of objects with masks; build it with `create_detector`.

    In training it takes targets and returns named losses, whose sum is minimised; otherwise it returns `Detections`.
    Losses, boxes and suppression are fp32 whatever the backbone and the heads compute in. Training draws anchors and
    proposals from torch's random state.
    """

    def __init__(self, backbone: nn.Module, kind: DetectorKind, num_classes: int, config: DetectionConfig) -> None:
        super().__init__()
        self.kind: str = kind
        self.num_classes = num_classes
        self.config = config
        cascade = kind == "cascade_mask_rcnn"
        norm = config.head_norm or ("sync_batch" if cascade else "none")
        self.pyramid = FeaturePyramid(backbone, config.pyramid_channels, config.pyramid_norm)
        self.rpn = ProposalNetwork(config, num_convs=2 if cascade else 1)
        self.box_heads = (CascadeHeads if cascade else BoxHeads)(config, num_classes, norm)
        self.mask_branch = MaskBranch(config, num_classes, norm) if config.masks else None

    def forward(
        self, images: Tensor, sizes: Tensor | Sequence[Sequence[int]], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the losses of a batch in training mode, what is found in its images in evaluation mode.

        Args:
            images: (B, 3, H, W) normalised, padded at the right and the bottom.
            sizes: (B, 2), height and width of each image without padding.
            targets: in training, one for each image; may be without objects. Crowds in them are ignored.

        The losses are rpn_objectness, rpn_box, box_class, box_regression (the cascade: each with _1, _2, _3) and
        mask. Raises ValueError for shapes, labels or boxes that cannot be right.
        """
        if not self.training:
            if targets is not None:
                raise ValueError("targets were given in evaluation mode; call train() for losses or leave them out")
            return self.detect(images, sizes)
        if targets is None or len(targets) != len(images):
            given = "none" if targets is None else str(len(targets))
            raise ValueError(f"training needs one target for each of the {len(images)} images, got {given}")
        truth = training_targets(targets, self.num_classes, masks=self.config.masks)
        pyramid, proposals, losses = self._propose(images, sizes, truth)
        chosen = training_boxes(proposals, truth, self.config)
        losses |= self.box_heads.losses(pyramid, chosen, truth)
        if self.mask_branch is None:
            return losses
        return losses | self.mask_branch.losses(pyramid, chosen, truth)

    def detect(self, images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[Detections]:
        """Return what is found in each image, in its own pixels; arguments as in `forward`."""
        pyramid, found = self.candidates(images, sizes)
        return self.with_masks(pyramid, [select(each, self.config) for each in found])

    def candidates(self, images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> tuple[Pyramid, list[Candidates]]:
        """Return the pyramid and each image's scored boxes before duplicates are suppressed (multi-scale test)."""
        pyramid, proposals, _ = self._propose(images, sizes, None)
        return pyramid, self.box_heads.candidates(pyramid, proposals)

    def with_masks(self, pyramid: Pyramid, found: Sequence[Candidates]) -> list[Detections]:
        """Return the boxes found in each image with their masks, if the detector predicts any."""
        masks: Sequence[Tensor | None] = [None] * len(found)
        if self.mask_branch is not None:
            labels = [each.labels for each in found]
            masks = self.mask_branch.probabilities(pyramid, [each.boxes for each in found], labels)
        return [
            Detections(each.boxes, each.labels, each.scores, mask, size)
            for each, mask, size in zip(found, masks, pyramid.sizes, strict=True)
        ]

    def _propose(
        self, images: Tensor, sizes: Tensor | Sequence[Sequence[int]], targets: Sequence[Target] | None
    ) -> tuple[Pyramid, list[Tensor], dict[str, Tensor]]:
        checked = _check_sizes(images, sizes)
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % DIVISIBILITY, 0, -height % DIVISIBILITY))
        maps = self.pyramid(images)
        proposals, losses = propose(self.rpn, images, checked, maps, targets)
        floats = {name: maps[name].float() for name in LEVELS}
        return Pyramid(floats, maps["scale2"].dtype, checked), proposals, losses


def create_detector(
    backbone: nn.Module,
    kind: DetectorKind = "cascade_mask_rcnn",
    num_classes: int = 80,
    config: DetectionConfig | None = None,
) -> Detector:
    """Build the published detector over a backbone: (B, 3, H, W) → {"scale2": …, "scale5": …} with `out_channels`.

    Args:
        kind: "mask_rcnn": a proposal network of one convolution, two linear layers, a box per class.
            "cascade_mask_rcnn": two convolutions; three heads of four convolutions and a linear layer, one box for
            all classes, IoU 0.5, 0.6, 0.7 (paper section 5.2; detectron2's configs for MViTv2).
        num_classes: without background; labels are 0 … num_classes - 1.
        config: heads and post-processing; None: as published.

    Raises ValueError, naming the argument and what it may be.
    """
    if kind not in get_args(DetectorKind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, get_args(DetectorKind)))}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1; background is not counted")
    return Detector(backbone, kind, num_classes, config or DetectionConfig())


def _check_sizes(images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; a detector takes (B, 3, H, W)")
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    checked = tuple((int(height), int(width)) for height, width in rows)
    high, wide = images.shape[-2:]
    if len(checked) != len(images) or not all(0 < h <= high and 0 < w <= wide for h, w in checked):
        raise ValueError(
            f"sizes {list(checked)} must give the height and width of each of {len(images)} images, "
            f"none larger than the batch's {high} x {wide}"
        )
    return checked
