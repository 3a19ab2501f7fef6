"""Boxes and masks drawn on pictures, for TensorBoard and `mvit predict`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# Twenty colours that can be told apart; a class keeps its colour
_COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe",
    "#008080", "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#a9a9a9",
)  # fmt: skip


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    scores: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the picture (3, H, W) uint8, on the CPU, with its objects drawn on it.

    boxes: (N, 4) XYXY in pixels. labels: (N,). masks: (N, h, w) bool from the upper left corner, h ≤ H, w ≤ W, or
    None. scores: (N,) or None. names: of the classes; None shows their numbers.
    """
    drawn = image.cpu().contiguous()
    if not len(boxes):
        return drawn
    boxes, labels = boxes.float().cpu(), labels.cpu()
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels.tolist()]
    if masks is not None:
        whole = torch.zeros((len(masks), *drawn.shape[1:]), dtype=torch.bool)
        whole[:, : masks.shape[1], : masks.shape[2]] = masks.cpu().bool()
        drawn = draw_segmentation_masks(drawn, whole, alpha=0.4, colors=list(colours))
    told: list[Any] = [str(label) if names is None else names[label] for label in labels.tolist()]
    if scores is not None:
        told = [f"{name} {score:.2f}" for name, score in zip(told, scores.tolist(), strict=True)]
    return draw_bounding_boxes(drawn, boxes, labels=told, colors=list(colours), width=1)
