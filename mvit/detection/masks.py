"""Masks of detected objects: their targets and loss, their probabilities, and pasting them into the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from mvit.detection.boxes import Matches, Target

# Shape legend: N objects or detections of an image, P positives of a batch, K classes, M mask side.

_PASTE_ELEMENTS = 1 << 25  # how many pixels of masks are pasted at once: 128 MiB of fp32


def mask_targets(positives: Matches, target: Target, side: int, *, aligned: bool, binary: bool) -> Tensor:
    """Cut the true masks of one image out at the boxes that are on them: (P, M, M) fp32 in [0, 1]."""
    if not len(positives.boxes):
        return positives.boxes.new_zeros((0, side, side))
    assert target.masks is not None
    used, index = positives.objects.unique(return_inverse=True)
    regions = torch.cat((index[:, None].to(positives.boxes), positives.boxes), dim=1)
    cut = roi_align(target.masks[used, None].float(), regions, side, 1.0, aligned=aligned)[:, 0]
    return (cut >= 0.5).float() if binary else cut


def mask_loss(
    logits: Tensor, positives: Sequence[Matches], targets: Sequence[Target], *, aligned: bool, binary: bool
) -> Tensor:
    """Return the mean binary cross-entropy of logits (P, K, M, M) for each object's own class, in fp32.

    Without positives it is 0, with a gradient of 0 for every parameter.
    """
    side = logits.shape[-1]
    labels = torch.cat([match.labels for match in positives])
    wanted = torch.cat(
        [
            mask_targets(match, target, side, aligned=aligned, binary=binary)
            for match, target in zip(positives, targets, strict=True)
        ]
    )
    own = logits[torch.arange(len(labels), device=labels.device), labels].float()  # (P, M, M)
    return F.binary_cross_entropy_with_logits(own, wanted, reduction="sum") / max(own.numel(), 1)


def mask_probabilities(logits: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
    """Return for each image the masks (N, M, M) of its detections' own classes, fp32 in [0, 1]."""
    every = torch.cat(list(labels))
    own = logits[torch.arange(len(every), device=every.device), every].float().sigmoid()
    return list(own.split([len(each) for each in labels]))


def paste_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, *, chunk: int | None = None
) -> Tensor:
    """Put mask probabilities (N, M, M) at their boxes (N, 4) in an image of `size` (H, W): (N, H, W) bool.

    A pixel belongs to the object where the mask, interpolated at the pixel's centre, is at least `threshold`.
    `chunk` masks are computed at once, within the box around theirs; None: one on a CPU, many on a GPU.
    """
    height, width = size
    pasted = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    if chunk is None:
        chunk = 1 if masks.device.type == "cpu" else max(1, _PASTE_ELEMENTS // (height * width))
    for start in range(0, len(masks), chunk):
        part = slice(start, start + chunk)
        low = boxes[part, :2].amin(dim=0).floor().long().clamp(min=0)
        high = boxes[part, 2:].amax(dim=0).ceil().long()
        (left, top), (right, bottom) = low.tolist(), high.tolist()
        right, bottom = min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            continue
        x = torch.arange(left, right, device=boxes.device, dtype=torch.float32) + 0.5
        y = torch.arange(top, bottom, device=boxes.device, dtype=torch.float32) + 0.5
        x0, y0, x1, y1 = boxes[part].float().split(1, dim=1)  # (n, 1) each
        columns = (x - x0) / (x1 - x0) * 2 - 1  # (n, w): -1 … 1 across the box
        rows = (y - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(
            (
                columns[:, None, :].expand(-1, len(y), -1),
                rows[:, :, None].expand(-1, -1, len(x)),
            ),
            dim=3,
        )  # (n, h, w, 2)
        values = F.grid_sample(masks[part, None].float(), grid, align_corners=False)[:, 0]
        pasted[part, top:bottom, left:right] = values >= threshold
    return pasted
