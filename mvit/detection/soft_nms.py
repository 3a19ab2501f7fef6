"""Soft non-maximum suppression (Bodla et al. 2017): overlapping boxes lose score instead of being dropped."""

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: Literal["linear", "gaussian"],
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    limit: int = 100,
) -> tuple[Tensor, Tensor]:
    """Return the indices and decayed scores of the `limit` best boxes, best first.

    Args:
        boxes, scores, labels: (N, 4) XYXY, (N,) and (N,); boxes of different labels do not touch each other.
        method: "linear" multiplies by 1 - IoU where the IoU is above `iou_threshold`; "gaussian" always, by
            exp(-IoU² / sigma).
        min_score: boxes whose score falls below are dropped.

    Scores only ever fall, so the boxes taken one after the other come in falling order: taking `limit` of them gives
    the same as decaying all and sorting, at a cost of N · limit overlaps.
    """
    left = scores.float().clone()
    boxes, kept, taken = boxes.float(), [], []
    for _ in range(min(limit, len(left))):
        best = left.argmax()
        kept.append(best)
        taken.append(left[best])
        overlap = box_iou(boxes[best][None], boxes)[0] * (labels == labels[best])  # (N,)
        if method == "linear":
            decay = torch.where(overlap > iou_threshold, 1 - overlap, torch.ones_like(overlap))
        else:
            decay = torch.exp(-overlap.square() / sigma)
        left = left * decay
        left[torch.stack(kept)] = -1.0  # again for all: a duplicate of the best would have made theirs zero
    if not kept:
        return labels.new_zeros((0,)), left
    index, score = torch.stack(kept), torch.stack(taken)
    good = score >= min_score
    return index[good], score[good]
