"""Cascade R-CNN's box heads (Cai and Vasconcelos 2018): three stages, each on the boxes the one before refined."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvit.detection.boxes import Matches, Target, box_losses, has_area, match, refine
from mvit.detection.candidates import Candidates, candidates
from mvit.detection.config import DetectionConfig, HeadNorm
from mvit.detection.fpn import Pyramid, RegionPool
from mvit.detection.heads import BOX_SIZE, BoxPredictor, convolutional_head

STAGE_IOUS = (0.5, 0.6, 0.7)  # of the first, `mask_rcnn.training_boxes` takes care
STAGE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class CascadeStage(nn.Module):
    """The head of one stage: pooled regions (R, C, 7, 7) → class logits (R, K + 1) and one box for all classes."""

    def __init__(self, config: DetectionConfig, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        self.head = convolutional_head(config.pyramid_channels, config.box_channels, config.box_features, norm)
        self.predictor = BoxPredictor(config.box_features, num_classes, class_agnostic=True)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.head(regions))


class CascadeHeads(nn.Module):
    """Three stages that demand IoUs of 0.5, 0.6 and 0.7; their class probabilities are averaged."""

    def __init__(self, config: DetectionConfig, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        self._config = config
        self.pool = RegionPool(BOX_SIZE, aligned=config.roi_aligned, sampling_ratio=config.roi_sampling_ratio)
        self.stages = nn.ModuleList(CascadeStage(config, num_classes, norm) for _ in STAGE_IOUS)

    def losses(self, pyramid: Pyramid, chosen: Sequence[Matches], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses of all stages; the first trains on `chosen`, the others on what the last one made of it.

        Boxes are matched anew for each stage but not drawn again; those without area are left out.
        """
        losses: dict[str, Tensor] = {}
        matches = list(chosen)
        boxes = [each.boxes for each in matches]
        for index, (stage, weights) in enumerate(zip(self.stages, STAGE_WEIGHTS, strict=True)):
            if index > 0:
                boxes = [each[torch.where(has_area(each))[0]] for each in boxes]
                matches = [match(each, target, STAGE_IOUS[index]) for each, target in zip(boxes, targets, strict=True)]
            logits, deltas = stage(_share_gradient(self.pool(pyramid, boxes)))
            classification, regression = box_losses(
                logits, deltas, matches, targets, weights, self._config.box_loss_beta
            )
            losses |= {f"box_class_{index + 1}": classification, f"box_regression_{index + 1}": regression}
            boxes = [each[:, 0] for each in refine(deltas.detach(), boxes, pyramid.sizes, weights)]
        return losses

    def candidates(self, pyramid: Pyramid, proposals: Sequence[Tensor]) -> list[Candidates]:
        """Return the scored boxes of each image before duplicates are suppressed."""
        boxes, probabilities = list(proposals), []
        for stage, weights in zip(self.stages, STAGE_WEIGHTS, strict=True):
            logits, deltas = stage(self.pool(pyramid, boxes))
            probabilities.append(logits.float().softmax(dim=1))
            boxes = [each[:, 0] for each in refine(deltas, boxes, pyramid.sizes, weights)]
        mean = torch.stack(probabilities).mean(dim=0).split([len(each) for each in boxes])
        return [
            candidates(each[:, None], scores, self._config.score_threshold)
            for each, scores in zip(boxes, mean, strict=True)
        ]


def _share_gradient(regions: Tensor) -> Tensor:
    """Pass the regions on, but a third of their gradient back: three stages train the same maps."""
    values = regions.detach()
    # Not a third and two thirds of the values: in half precision their sum is off, and the test sees other regions
    return values + (regions - values) / len(STAGE_IOUS)
