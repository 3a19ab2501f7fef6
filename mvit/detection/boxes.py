"""Boxes and targets of detection: what is checked, matched, sampled, refined and clipped, always in fp32."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import box_iou, clip_boxes_to_image

# Shape legend: B images, N objects or boxes of an image, R boxes of a whole batch, K classes, M mask side.

BACKGROUND = -1  # the label of a box on no object, until `class_targets` turns it into the last class


@dataclass(frozen=True)
class Target:
    """The objects of one image, in pixels of the image as the detector sees it.

    Shapes: boxes (N, 4) float32 XYXY; labels (N,) int64 in 0 … num_classes - 1; masks (N, H, W) bool or uint8, from
    the image's upper left corner, of the padded or the unpadded size, None for a detector of boxes alone; is_crowd
    (N,) bool, None for no crowds.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    is_crowd: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Target":
        """Return the target with its tensors on `device`."""
        moved = (
            None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.masks, self.is_crowd)
        )
        boxes, labels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.boxes, self.labels))
        return Target(boxes, labels, *moved)


def training_targets(targets: Sequence[Target], num_classes: int, *, masks: bool) -> list[Target]:
    """Check the targets of a batch and leave out the crowds.

    A crowd is a region, not an object: it is never a positive, and what lies in it counts as background, as in the
    published training (only the metric treats crowds as regions to ignore). Raises ValueError for targets that would
    make the loss wrong or infinite.
    """
    checked = [_without_crowds(target) for target in targets]
    for index, target in enumerate(checked):
        if target.boxes.dtype != torch.float32 or target.labels.dtype != torch.int64:
            raise ValueError(
                f"target {index} of the batch: boxes are {target.boxes.dtype} and labels {target.labels.dtype}; they "
                "must be float32 (half precision moves boxes by pixels) and int64"
            )
        count = len(target.labels)
        if target.labels.ndim != 1 or target.boxes.shape != (count, 4):
            raise ValueError(
                f"target {index} of the batch: boxes {tuple(target.boxes.shape)} and labels "
                f"{tuple(target.labels.shape)} must be (N, 4) and (N,)"
            )
        if masks and (target.masks is None or target.masks.ndim != 3 or len(target.masks) != count):
            given = "none" if target.masks is None else str(tuple(target.masks.shape))
            raise ValueError(
                f"target {index} of the batch: masks {given} must be ({count}, H, W); without masks in the data, "
                "build the detector with masks=False"
            )
    boxes = torch.cat([target.boxes for target in checked])
    labels = torch.cat([target.labels for target in checked])
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    wrong_box = ~((width > 0) & (height > 0) & boxes.isfinite().all(dim=1))
    wrong_label = (labels < 0) | (labels >= num_classes)
    if bool((wrong_box | wrong_label).any()):  # one wait for the device; matching waits for it many times anyway
        if bool(wrong_box.any()):
            raise ValueError(
                f"box {boxes[wrong_box][0].tolist()} has no area or is not finite; boxes are XYXY in pixels with "
                "x2 > x1 and y2 > y1. Drop such objects when the data is read (`mvit data check` names them)"
            )
        raise ValueError(
            f"label {int(labels[wrong_label][0])} is not in 0 … {num_classes - 1}; labels count from 0 without a "
            "background class"
        )
    return checked


def _without_crowds(target: Target) -> Target:
    if target.is_crowd is None:
        return target
    keep = ~target.is_crowd.bool()
    masks = None if target.masks is None else target.masks[keep]
    return Target(target.boxes[keep], target.labels[keep], masks)


@dataclass(frozen=True)
class Matches:
    """The boxes of one image that train a head.

    Shapes: boxes (N, 4); labels (N,) class of the object each box is on, or BACKGROUND; objects (N,) its index in the
    image's target, 0 for background.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor

    def __getitem__(self, index: Tensor) -> "Matches":
        return replace(self, boxes=self.boxes[index], labels=self.labels[index], objects=self.objects[index])

    @property
    def positive(self) -> "Matches":
        """Those on an object."""
        return self[torch.where(self.labels != BACKGROUND)[0]]


def match(boxes: Tensor, target: Target, iou: float) -> Matches:
    """Give every box (N, 4) the object that it overlaps most, if by at least `iou`."""
    labels = torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    if not len(target.boxes) or not len(boxes):
        return Matches(boxes, labels, torch.zeros_like(labels))
    matched = Matcher(iou, iou)(box_iou(target.boxes, boxes))
    objects = matched.clamp(min=0)
    return Matches(boxes, torch.where(matched >= 0, target.labels[objects], labels), objects)


def sample(matches: Matches, batch_size: int, positive_fraction: float) -> Matches:
    """Draw at most `batch_size` boxes from torch's random state, at most that fraction of them on objects."""
    sampler = BalancedPositiveNegativeSampler(batch_size, positive_fraction)
    positive, negative = sampler([(matches.labels != BACKGROUND).long()])
    return matches[torch.where(positive[0] | negative[0])[0]]


def class_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Return class indices for the cross-entropy, background as the last of num_classes + 1."""
    return torch.where(labels == BACKGROUND, num_classes, labels)


def box_losses(
    logits: Tensor,
    deltas: Tensor,
    matches: Sequence[Matches],
    targets: Sequence[Target],
    weights: tuple[float, float, float, float],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return the classification and the regression loss of a box head (Fast R-CNN), in fp32.

    Args:
        logits: (R, K + 1), background last. deltas: (R, 4) or one box per class, (R, 4 K).
        matches, targets: per image, R boxes in all. weights: of the four deltas.
        beta: of the smooth L1 loss, which is summed over boxes on objects and divided by R.

    Without any boxes both are 0, with a gradient of 0 for every parameter.
    """
    logits, deltas = logits.float(), deltas.float()
    num_classes = logits.shape[1] - 1
    labels = torch.cat([match.labels for match in matches])
    total = max(len(labels), 1)
    classification = F.cross_entropy(logits, class_targets(labels, num_classes), reduction="sum") / total
    on_object = torch.where(labels != BACKGROUND)[0]
    positives = [match.positive for match in matches]
    truth = [target.boxes[match.objects] for target, match in zip(targets, positives, strict=True)]
    wanted = torch.cat(BoxCoder(weights).encode(truth, [match.boxes for match in positives]))  # (P, 4)
    predicted = deltas.view(len(deltas), deltas.shape[1] // 4, 4)[on_object]  # (P, 1 or K, 4)
    if predicted.shape[1] > 1:
        predicted = predicted[torch.arange(len(on_object), device=labels.device), labels[on_object]]
    regression = F.smooth_l1_loss(predicted.view(-1, 4), wanted, beta=beta, reduction="sum") / total
    return classification, regression


def refine(
    deltas: Tensor,
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    weights: tuple[float, float, float, float],
) -> list[Tensor]:
    """Apply predicted deltas (R, 4 C) to boxes, per image (N, 4): per image (N, C, 4), clipped to the image (H, W).

    What is not a number becomes 0, a box without area: RoIAlign would read outside its memory.
    """
    counts = [len(box) for box in boxes]
    shape = (sum(counts), deltas.shape[1] // 4, 4)
    refined = BoxCoder(weights).decode(deltas.float(), list(boxes)).reshape(shape)
    parts = torch.nan_to_num(refined).split(counts)
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


def has_area(boxes: Tensor) -> Tensor:
    """Say of each box (N, 4) whether it is at least a hundredth of a pixel wide and high."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= 0.01).all(dim=1)
