"""Whole detectors are of the published size, and a small one learns to find shapes."""

from typing import Any

import pytest
import torch

import mvit
from mvit.detection.coco_metric import CocoMetric, encode_masks
from mvit.detection.config import DetectionConfig
from mvit.detection.detector import create_detector
from tests.mvit.detection.tiny import SMALL, TinyBackbone, shapes


# Paper, Tables 5a and 5b; large with the growth in the MLP, as in its ImageNet-1K weights
@pytest.mark.parametrize(
    ("variant", "kind", "expand", "millions"),
    [
        ("mvitv2_tiny", "mask_rcnn", "attention", 44),
        ("mvitv2_small", "mask_rcnn", "attention", 54),
        ("mvitv2_base", "mask_rcnn", "attention", 71),
        ("mvitv2_large", "mask_rcnn", "mlp", 238),
        ("mvitv2_tiny", "cascade_mask_rcnn", "attention", 76),
        ("mvitv2_small", "cascade_mask_rcnn", "attention", 87),
        ("mvitv2_base", "cascade_mask_rcnn", "attention", 103),
        ("mvitv2_large", "cascade_mask_rcnn", "mlp", 270),
        ("mvitv2_huge", "cascade_mask_rcnn", "attention", 718),
    ],
)
def test_detectors_have_the_published_number_of_parameters(variant: str, kind: Any, expand: Any, millions: int) -> None:
    with torch.device("meta"):
        detector = create_detector(mvit.create_backbone(variant, expand=expand), kind, 80, DetectionConfig())
    assert round(sum(parameter.numel() for parameter in detector.parameters()) / 1e6) == millions


def test_a_backbone_of_ours_trains_and_detects() -> None:
    torch.manual_seed(0)
    detector = create_detector(mvit.create_backbone("mvitv2_tiny"), "cascade_mask_rcnn", 3, SMALL)
    images, sizes, targets = shapes(1, 80, seed=0)
    losses = detector.train()(images, sizes, targets)
    assert isinstance(losses, dict)
    sum(losses.values(), torch.zeros(())).backward()
    still = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    with torch.no_grad():
        (found,) = detector.eval()(images, sizes)
    assert found.size == (80, 80)


def test_a_small_detector_learns_to_find_and_outline_shapes() -> None:
    torch.manual_seed(0)
    side, count = 64, 4
    images, sizes, targets = shapes(count, side, seed=0)
    config = SMALL.model_copy(update={"pyramid_channels": 24, "box_features": 64, "box_batch_size": 16})
    detector = create_detector(TinyBackbone(12), "mask_rcnn", 3, config).train()
    steps = 90
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    seen = []
    for _ in range(steps):
        losses = detector(images, sizes, targets)
        assert isinstance(losses, dict)
        loss = sum(losses.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.4 * sum(seen[:5])
    truth = {
        "images": [{"id": index, "height": side, "width": side} for index in range(count)],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(3)],
        "annotations": [],
    }
    for index, target in enumerate(targets):
        assert target.masks is not None
        for box, label, code in zip(
            target.boxes.tolist(), target.labels.tolist(), encode_masks(target.masks), strict=True
        ):
            left, top, right, bottom = box
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": code,
                    "iscrowd": 0,
                    "area": (right - left) * (bottom - top),
                }
            )
    metric = CocoMetric(lambda: truth)
    with torch.no_grad():
        for index, found in enumerate(detector.eval()(images, sizes)):
            metric.add(found, index, (side, side))
    figures = metric.compute()
    assert figures["box_ap50"] > 0.5
    assert figures["mask_ap50"] > 0.5
