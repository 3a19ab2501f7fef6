"""A small convolutional backbone and pictures of coloured shapes, for the detection tests."""

import torch
from torch import Tensor, nn

from mvit.detection.boxes import Target
from mvit.detection.config import DetectionConfig

SMALL = DetectionConfig(
    pyramid_channels=16,
    box_channels=16,
    box_features=32,
    mask_channels=16,
    proposal_batch_size=64,
    proposals_before_nms=100,
    proposals_before_nms_test=100,
    proposals_after_nms=50,
    box_batch_size=32,
)
COLOURS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


class TinyBackbone(nn.Module):
    """(B, 3, H, W) → scale2 … scale5 by strided convolutions."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.out_channels = {f"scale{level}": channels * 2**index for index, level in enumerate(range(2, 6))}
        widths = list(self.out_channels.values())
        self.stem = nn.Conv2d(3, widths[0], 5, stride=4, padding=2)
        self.steps = nn.ModuleList(nn.Conv2d(a, 2 * a, 3, stride=2, padding=1) for a in widths[:-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        maps = {"scale2": x}
        for level, step in enumerate(self.steps, start=3):
            x = step(x.relu())
            maps[f"scale{level}"] = x
        return maps


def shapes(count: int, side: int, seed: int, objects: int = 2) -> tuple[Tensor, list[list[int]], list[Target]]:
    """Return `count` pictures of squares in the three classes' colours, their sizes, and the targets."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn((count, 3, side, side), generator=random) * 0.1
    targets = []
    for image in images:
        boxes, labels, masks = [], [], []
        for column in range(objects):  # beside each other, so that none hides another
            width = side // max(objects, 1)
            edge = int(torch.randint(width // 2, width - 2, (1,), generator=random))
            left = column * width + int(torch.randint(0, width - edge, (1,), generator=random))
            top = int(torch.randint(0, side - edge, (1,), generator=random))
            label = int(torch.randint(0, 3, (1,), generator=random))
            image[:, top : top + edge, left : left + edge] = COLOURS[label][:, None, None]
            mask = torch.zeros((side, side), dtype=torch.bool)
            mask[top : top + edge, left : left + edge] = True
            boxes.append([left, top, left + edge, top + edge])
            labels.append(label)
            masks.append(mask)
        targets.append(
            Target(
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                torch.tensor(labels, dtype=torch.int64),
                torch.stack(masks) if masks else torch.zeros((0, side, side), dtype=torch.bool),
            )
        )
    return images, [[side, side]] * count, targets


def empty_target(side: int) -> Target:
    """Return the target of an image without objects."""
    return Target(
        torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros((0, side, side), dtype=torch.bool)
    )
