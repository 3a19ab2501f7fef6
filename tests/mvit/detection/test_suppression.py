"""Duplicates are suppressed as published: hard and soft, within a class, over scales and mirrored views."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from mvit.detection.candidates import Candidates, candidates, merge, select
from mvit.detection.config import DetectionConfig
from mvit.detection.detector import create_detector
from mvit.detection.multi_scale import View, detect_in_views, to_original, to_view
from mvit.detection.soft_nms import soft_nms
from tests.mvit.detection.tiny import SMALL, TinyBackbone


def _random(count: int, seed: int, classes: int = 3) -> Candidates:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand((count, 2), generator=random) * 40
    boxes = torch.cat((corner, corner + 10 + torch.rand((count, 2), generator=random) * 30), dim=1)
    return Candidates(boxes, torch.rand(count, generator=random), torch.randint(0, classes, (count,), generator=random))


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _plain_soft_nms(found: Candidates, method: str, threshold: float, sigma: float) -> list[tuple[int, float]]:
    """The loop of the paper (figure 3), class by class, over all boxes."""
    taken: list[tuple[int, float]] = []
    boxes, scores, labels = found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    for label in set(labels):
        left = {index: scores[index] for index in range(len(scores)) if labels[index] == label}
        while left:
            best = max(left, key=lambda index: left[index])
            taken.append((best, left.pop(best)))
            for index in left:
                overlap = _iou(boxes[best], boxes[index])
                if method == "gaussian":
                    left[index] *= math.exp(-(overlap**2) / sigma)
                elif overlap > threshold:
                    left[index] *= 1 - overlap
    return sorted(taken, key=lambda row: -row[1])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("limit", [5, 200])
def test_soft_nms_agrees_with_the_papers_loop(method: Literal["linear", "gaussian"], limit: int) -> None:
    found = _random(60, seed=0)
    keep, scores = soft_nms(
        found.boxes,
        found.scores,
        found.labels,
        method=method,
        iou_threshold=0.3,
        sigma=0.5,
        min_score=0.05,
        limit=limit,
    )
    expected = [row for row in _plain_soft_nms(found, method, 0.3, 0.5) if row[1] >= 0.05][:limit]
    assert keep.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(scores, torch.tensor([score for _, score in expected]))


def test_soft_nms_takes_a_box_and_its_exact_copy_once_each() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    keep, scores = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3).long(), method="linear", min_score=0.0)
    assert sorted(keep.tolist()) == [0, 1, 2]
    assert scores.tolist() == pytest.approx([0.9, 0.0, 0.0])


def test_soft_nms_of_nothing_is_nothing() -> None:
    keep, scores = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), method="gaussian")
    assert len(keep) == len(scores) == 0


def test_hard_suppression_works_within_each_class_and_keeps_the_best() -> None:
    found = _random(80, seed=1)
    config = DetectionConfig(nms_iou=0.4, detections_per_image=12)
    kept = select(found, config)
    expected = []
    for label in range(3):
        index = torch.where(found.labels == label)[0]
        expected += index[nms(found.boxes[index], found.scores[index], 0.4)].tolist()
    expected = sorted(expected, key=lambda index: -float(found.scores[index]))[:12]
    torch.testing.assert_close(kept.boxes, found.boxes[expected])
    assert kept.labels.tolist() == found.labels[expected].tolist()


def test_soft_suppression_is_chosen_by_the_config() -> None:
    found = _random(80, seed=1)
    soft = select(found, DetectionConfig(soft_nms="gaussian", detections_per_image=40))
    assert (soft.scores.diff() <= 0).all()
    assert not torch.equal(soft.scores, select(found, DetectionConfig(detections_per_image=40)).scores)


def test_candidates_are_every_class_above_the_threshold_but_background() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0]], [[1.0, 1.0, 1.0, 5.0]]])  # the second has no area
    scores = torch.tensor([[0.3, 0.25, 0.45], [0.9, 0.05, 0.05]])
    found = candidates(boxes, scores, 0.2)
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.3, 0.25])
    per_class = torch.arange(8.0).view(1, 2, 4) + torch.tensor([0.0, 0.0, 5.0, 5.0])
    assert candidates(per_class, torch.tensor([[0.1, 0.8, 0.1]]), 0.2).boxes.tolist() == per_class[:, 1].tolist()


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_of_a_view_go_to_the_original_and_back(mirrored: bool) -> None:
    view = View(torch.zeros(1, 3, 64, 96), (50, 80), mirrored)
    found = Candidates(torch.tensor([[8.0, 5.0, 24.0, 25.0]]), torch.ones(1), torch.zeros(1).long())
    original = to_original(found, view, (100, 240))
    left, right = (168.0, 216.0) if mirrored else (24.0, 72.0)
    assert original.boxes.tolist() == [[left, 10.0, right, 50.0]]
    torch.testing.assert_close(to_view(original, view, (100, 240)).boxes, found.boxes)


def test_views_are_suppressed_together_and_once() -> None:
    one, two = _random(30, seed=2), _random(30, seed=3)
    config = DetectionConfig(detections_per_image=10)
    both = Candidates(
        torch.cat((one.boxes, two.boxes)), torch.cat((one.scores, two.scores)), torch.cat((one.labels, two.labels))
    )
    torch.testing.assert_close(merge([one, two], config).boxes, select(both, config).boxes)
    with pytest.raises(ValueError, match="at least one"):
        merge([], config)


def _detector() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"score_threshold": 0.0, "detections_per_image": 8})
    return create_detector(TinyBackbone(), "cascade_mask_rcnn", 3, config).eval(), torch.randn(1, 3, 64, 64)


def test_a_multi_scale_test_of_one_view_is_the_plain_test() -> None:
    detector, image = _detector()
    with torch.no_grad():
        (plain,) = detector(image, [[64, 64]])
    found = detect_in_views(detector, [View(image, (64, 64))], (64, 64))  # pyright: ignore[reportArgumentType]
    for name in ("boxes", "labels", "scores", "masks"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))


def test_views_of_several_scales_and_mirrored_give_one_answer_in_original_pixels() -> None:
    detector, image = _detector()
    large = torch.nn.functional.interpolate(image, size=(96, 96))
    views = [View(image, (64, 64)), View(large, (96, 96)), View(image.flip(-1), (64, 64), mirrored=True)]
    found = detect_in_views(detector, views, (128, 192))  # pyright: ignore[reportArgumentType]
    assert found.size == (128, 192)
    assert len(found) == 8
    assert found.boxes[:, 2].max() > 64
    assert found.pasted().shape == (8, 128, 192)
