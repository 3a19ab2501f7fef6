"""What a detector found in one image, and where that is in the original image."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvit.detection.masks import paste_masks


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best first.

    Shapes: boxes (N, 4) fp32 XYXY in pixels of an image of `size` (H, W); labels (N,) int64 from 0; scores (N,) in
    [0, 1]; masks (N, 28, 28) fp32 probabilities over each box, which `pasted` puts into the image, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, part: slice) -> "Detections":
        masks = None if self.masks is None else self.masks[part]
        return Detections(self.boxes[part], self.labels[part], self.scores[part], masks, self.size)

    def to(self, device: torch.device | str) -> "Detections":
        """Return the detections on `device`."""
        masks = None if self.masks is None else self.masks.to(device)
        boxes, labels, scores = (tensor.to(device) for tensor in (self.boxes, self.labels, self.scores))
        return Detections(boxes, labels, scores, masks, self.size)

    def resized(self, size: tuple[int, int]) -> "Detections":
        """Return them in the coordinates of the same image at another size (H, W), the original's usually."""
        return replace(self, boxes=resize_boxes(self.boxes, self.size, size), size=size)

    def pasted(self, threshold: float = 0.5) -> Tensor:
        """Return the masks in the image, (N, H, W) bool; raises ValueError if the detector predicts none."""
        if self.masks is None:
            raise ValueError("these detections have no masks: the detector was built with masks=False")
        return paste_masks(self.masks, self.boxes, self.size, threshold)


def resize_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return boxes (N, 4) of an image of size `old` (H, W) in the coordinates of one of size `new`."""
    scale = boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
    return boxes * scale


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (N, 4) in an image of this width, left to right."""
    return torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
