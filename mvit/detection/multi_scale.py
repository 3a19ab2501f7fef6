"""The multi-scale test: one image seen at several sizes and mirrored, its boxes merged before suppression."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvit.detection.candidates import Candidates, merge
from mvit.detection.detections import Detections, flip_boxes, resize_boxes
from mvit.detection.detector import Detector


@dataclass(frozen=True)
class View:
    """One look at an image: pixels (1, 3, H, W), normalised; `size` (h, w) of the image in them, without padding.

    `mirrored`: the image was flipped left to right before it was padded.
    """

    pixels: Tensor
    size: tuple[int, int]
    mirrored: bool = False


def to_original(found: Candidates, view: View, original: tuple[int, int]) -> Candidates:
    """Return boxes found in a view in the coordinates of the original image of size (H, W)."""
    boxes = flip_boxes(found.boxes, view.size[1]) if view.mirrored else found.boxes
    return replace(found, boxes=resize_boxes(boxes, view.size, original))


def to_view(found: Candidates, view: View, original: tuple[int, int]) -> Candidates:
    """Return boxes of the original image in the coordinates of a view; undoes `to_original`."""
    boxes = resize_boxes(found.boxes, original, view.size)
    return replace(found, boxes=flip_boxes(boxes, view.size[1]) if view.mirrored else boxes)


@torch.no_grad()
def detect_in_views(detector: Detector, views: Sequence[View], original: tuple[int, int]) -> Detections:
    """Return what is found in one image of size `original` (H, W), looked at in several views (paper, Table A.1).

    The scored boxes of all views are suppressed together, once; masks are the mean over the views. The detector must
    be in evaluation mode. Raises ValueError without views.
    """
    looks = [(view, *detector.candidates(view.pixels, [view.size])) for view in views]
    best = merge([to_original(found[0], view, original) for view, _, found in looks], detector.config)
    masks: list[Tensor] = []
    for view, pyramid, _ in looks:
        mask = detector.with_masks(pyramid, [to_view(best, view, original)])[0].masks
        if mask is not None:
            masks.append(mask.flip(-1) if view.mirrored else mask)
    mean = torch.stack(masks).mean(dim=0) if masks else None
    return Detections(best.boxes, best.labels, best.scores, mean, original)
