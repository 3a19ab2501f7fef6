"""From scored boxes to detections: the threshold, the suppression of duplicates, the best of each image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mvit.detection.boxes import has_area
from mvit.detection.config import DetectionConfig
from mvit.detection.soft_nms import soft_nms


@dataclass(frozen=True)
class Candidates:
    """Scored boxes of one image; a box may stand here once for every class.

    Shapes: boxes (N, 4) fp32 XYXY, scores (N,) in [0, 1], labels (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor) -> "Candidates":
        return Candidates(self.boxes[index], self.scores[index], self.labels[index])


def candidates(boxes: Tensor, probabilities: Tensor, threshold: float) -> Candidates:
    """Return every (box, class) whose probability is above `threshold`.

    Shapes: boxes (N, K, 4), or (N, 1, 4) for all classes; probabilities (N, K + 1), background last and never taken.
    """
    foreground = probabilities[:, :-1]
    index, labels = torch.where(foreground > threshold)  # false for what is not a number
    own = boxes[index, labels] if boxes.shape[1] > 1 else boxes[index, 0]
    found = Candidates(own, foreground[index, labels], labels)
    return found[torch.where(has_area(own))[0]]


def select(found: Candidates, config: DetectionConfig) -> Candidates:
    """Return the `detections_per_image` best after (soft) non-maximum suppression within each class, best first."""
    if config.soft_nms == "off":
        keep = batched_nms(found.boxes.float(), found.scores.float(), found.labels, config.nms_iou)
        return found[keep[: config.detections_per_image]]
    keep, scores = soft_nms(
        found.boxes,
        found.scores,
        found.labels,
        method=config.soft_nms,
        iou_threshold=config.nms_iou,
        sigma=config.soft_nms_sigma,
        min_score=config.soft_nms_min_score,
        limit=config.detections_per_image,
    )
    kept = found[keep]
    return Candidates(kept.boxes, scores, kept.labels)


def merge(views: list[Candidates], config: DetectionConfig) -> Candidates:
    """Return the best of several views of one image, all in its own coordinates: together, then `select` once."""
    if not views:
        raise ValueError("no views to merge: a multi-scale test needs at least one")
    return select(
        Candidates(
            torch.cat([view.boxes for view in views]),
            torch.cat([view.scores for view in views]),
            torch.cat([view.labels for view in views]),
        ),
        config,
    )
