"""Mask R-CNN's box head (He et al. 2017; Fast R-CNN on the pyramid) and the mask branch it shares with the cascade."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvit.detection.boxes import Matches, Target, box_losses, match, refine, sample
from mvit.detection.candidates import Candidates, candidates
from mvit.detection.config import DetectionConfig, HeadNorm
from mvit.detection.fpn import Pyramid, RegionPool
from mvit.detection.heads import BOX_SIZE, MASK_SIZE, BoxPredictor, MaskHead, convolutional_head, two_layer_head
from mvit.detection.masks import mask_loss, mask_probabilities

# Shape legend: R boxes of a whole batch, N of one image, C channels, K classes.

MATCH_IOU = 0.5
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def training_boxes(proposals: Sequence[Tensor], targets: Sequence[Target], config: DetectionConfig) -> list[Matches]:
    """Match proposals and the true boxes, which are added to them, with the objects, and draw those that train."""
    return [
        sample(
            match(torch.cat((boxes, target.boxes)), target, MATCH_IOU),
            config.box_batch_size,
            config.box_positive_fraction,
        )
        for boxes, target in zip(proposals, targets, strict=True)
    ]


class BoxHeads(nn.Module):
    """One box head on the proposals, with a box for each class."""

    def __init__(self, config: DetectionConfig, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        self._config = config
        self.pool = RegionPool(BOX_SIZE, aligned=config.roi_aligned, sampling_ratio=config.roi_sampling_ratio)
        if norm == "none":
            self.head = two_layer_head(config.pyramid_channels, config.box_features)
        else:
            self.head = convolutional_head(config.pyramid_channels, config.box_channels, config.box_features, norm)
        self.predictor = BoxPredictor(config.box_features, num_classes, class_agnostic=False)

    def losses(self, pyramid: Pyramid, chosen: Sequence[Matches], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses of the boxes drawn for training."""
        logits, deltas = self._predict(pyramid, [matches.boxes for matches in chosen])
        classification, regression = box_losses(
            logits, deltas, chosen, targets, DELTA_WEIGHTS, self._config.box_loss_beta
        )
        return {"box_class": classification, "box_regression": regression}

    def candidates(self, pyramid: Pyramid, proposals: Sequence[Tensor]) -> list[Candidates]:
        """Return the scored boxes of each image before duplicates are suppressed."""
        logits, deltas = self._predict(pyramid, proposals)
        probabilities = logits.float().softmax(dim=1).split([len(boxes) for boxes in proposals])
        refined = refine(deltas, proposals, pyramid.sizes, DELTA_WEIGHTS)
        return [
            candidates(boxes, scores, self._config.score_threshold)
            for boxes, scores in zip(refined, probabilities, strict=True)
        ]

    def _predict(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.predictor(self.head(self.pool(pyramid, boxes)))


class MaskBranch(nn.Module):
    """Masks of 28 x 28 for boxes that are on objects."""

    def __init__(self, config: DetectionConfig, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        self._config = config
        self.pool = RegionPool(MASK_SIZE, aligned=config.roi_aligned, sampling_ratio=config.roi_sampling_ratio)
        self.head = MaskHead(config, num_classes, norm)

    def losses(self, pyramid: Pyramid, chosen: Sequence[Matches], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the loss of the boxes that were drawn for training and are on objects."""
        positives = [matches.positive for matches in chosen]
        logits = self.head(self.pool(pyramid, [matches.boxes for matches in positives]))
        config = self._config
        return {
            "mask": mask_loss(logits, positives, targets, aligned=config.roi_aligned, binary=config.binary_mask_targets)
        }

    def probabilities(self, pyramid: Pyramid, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks (N, 28, 28) of each image's detections, fp32 in [0, 1]."""
        return mask_probabilities(self.head(self.pool(pyramid, boxes)), labels)
