"""Masks go into the image where their boxes are, and come out of it as targets."""

import pytest
import torch

from mvit.detection import coco_metric
from mvit.detection.boxes import Matches, Target
from mvit.detection.detections import Detections
from mvit.detection.masks import mask_targets, paste_masks


def test_a_full_mask_covers_the_pixels_whose_centres_are_in_its_box() -> None:
    boxes = torch.tensor([[2.0, 1.0, 6.0, 4.0], [2.6, 1.0, 5.4, 3.4]])
    pasted = paste_masks(torch.ones(2, 28, 28), boxes, (6, 8))
    assert pasted.dtype == torch.bool
    expected = torch.zeros(2, 6, 8, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    expected[1, 1:3, 3:5] = True
    assert torch.equal(pasted, expected)


def test_boxes_that_leave_the_image_are_cut() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[-3.0, -3.0, 20.0, 2.0]]), (6, 8))
    assert pasted[0, :2].all()
    assert not pasted[0, 2:].any()
    assert not paste_masks(torch.ones(1, 28, 28), torch.tensor([[9.0, 0.0, 12.0, 2.0]]), (6, 8)).any()


def test_pasting_all_at_once_is_pasting_one_by_one() -> None:
    """A CPU pastes each mask into its own box, a GPU many into the box around them: the same masks."""
    random = torch.Generator().manual_seed(0)
    corner = torch.rand((5, 2), generator=random) * 30
    boxes = torch.cat((corner, corner + 3 + torch.rand((5, 2), generator=random) * 20), dim=1)
    masks = torch.rand((5, 28, 28), generator=random)
    together = paste_masks(masks, boxes, (50, 60), chunk=5)
    assert torch.equal(together, paste_masks(masks, boxes, (50, 60), chunk=1))
    assert together.any(dim=(1, 2)).all()


def test_a_mask_cut_out_and_pasted_back_is_the_mask() -> None:
    y, x = torch.meshgrid(torch.arange(100.0) + 0.5, torch.arange(120.0) + 0.5, indexing="ij")
    disc = ((x - 60) ** 2 + (y - 50) ** 2 <= 30**2)[None]
    target = Target(torch.tensor([[30.0, 20.0, 90.0, 80.0]]), torch.tensor([0]), disc)
    match = Matches(target.boxes, target.labels, torch.tensor([0]))
    cut = mask_targets(match, target, 28, aligned=True, binary=True)
    back = paste_masks(cut, target.boxes, (100, 120))
    both, either = (back & disc).sum(), (back | disc).sum()
    assert both / either > 0.97


def test_targets_are_cut_from_the_object_that_a_box_is_on() -> None:
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[2, 5:15, 5:15] = 1
    box = torch.tensor([[5.0, 5.0, 15.0, 15.0]])
    target = Target(box.repeat(3, 1), torch.tensor([0, 1, 2]), masks)
    boxes = box.repeat(2, 1)
    cut = mask_targets(
        Matches(boxes, torch.tensor([2, 0]), torch.tensor([2, 0])), target, 28, aligned=True, binary=True
    )
    assert cut[0, 1:-1, 1:-1].all()  # at a corner of the true mask a quarter of the samples is in it
    assert not cut[1].any()


def test_resized_detections_move_their_boxes_and_masks() -> None:
    found = Detections(
        torch.tensor([[2.0, 4.0, 6.0, 8.0]]), torch.tensor([1]), torch.ones(1), torch.ones(1, 28, 28), (10, 20)
    ).resized((20, 60))
    assert found.boxes.tolist() == [[6.0, 8.0, 18.0, 16.0]]
    assert int(found.pasted().sum()) == 12 * 8


def test_masks_of_large_images_are_encoded_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[2.0, 4.0, 30.0, 28.0], [0.0, 0.0, 40.0, 40.0], [10.0, 3.0, 20.0, 33.0]])
    found = Detections(boxes, torch.zeros(3).long(), torch.ones(3), torch.rand((3, 28, 28), generator=random), (40, 50))
    whole = coco_metric.encode_masks(found.pasted())
    monkeypatch.setattr(coco_metric, "_ENCODED_PIXELS", 40 * 50 * 2)
    metric = coco_metric.CocoMetric(dict)
    metric.add(found, 1, (40, 50))
    assert [row["segmentation"] for row in metric._results] == whole
