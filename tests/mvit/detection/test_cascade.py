"""The cascade's numbers, computed by hand: overlaps and weights of the stages, their gradient, their mean."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvit.detection.boxes import BACKGROUND, Matches, Target
from mvit.detection.cascade import CascadeHeads
from mvit.detection.fpn import LEVELS, STRIDES, Pyramid
from mvit.detection.mask_rcnn import training_boxes
from tests.mvit.detection.tiny import SMALL

SIDE, CLASSES = 128, 3
OBJECT = [20.0, 20.0, 60.0, 60.0]  # of class 1
# 40 wide and 32 high. Overlaps with the object: 0.55, 0.76, 0.38 and 0.67
PROPOSALS = [[12.0, 24.0, 52.0, 56.0], [19.0, 24.0, 59.0, 56.0], [5.0, 24.0, 45.0, 56.0], [24.0, 24.0, 64.0, 56.0]]
LABELS = [1, 1, BACKGROUND, 1]
# Every stage says the same of every box. The first: 0.2 widths to the right, 1.25 times as high; the second: 0.05
# widths to the right, 0.95 times as high; the third: 0.1 widths to the left
DELTAS = ([2.0, 0, 0, 5 * math.log(1.25)], [1.0, 0, 0, 10 * math.log(0.95)], [-3.0, 0, 0, 0])
PROBABILITIES = ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.1, 0.4], [0.1, 0.6, 0.2, 0.1])  # background last


def swapped(boxes: list[list[float]], swap: bool) -> Tensor:
    """Return boxes or deltas (N, 4), with x and y exchanged if asked for."""
    return torch.tensor(boxes)[:, [1, 0, 3, 2] if swap else [0, 1, 2, 3]]


def constant_heads(swap: bool = False) -> CascadeHeads:
    """Return heads whose stages answer `DELTAS` and `PROBABILITIES` to every region."""
    heads = CascadeHeads(SMALL, CLASSES, "none")
    with torch.no_grad():
        for index, (deltas, probabilities) in enumerate(zip(DELTAS, PROBABILITIES, strict=True)):
            predictor = heads.get_submodule(f"stages.{index}.predictor")
            for layer in ("bbox_pred", "cls_score"):
                predictor.get_parameter(f"{layer}.weight").zero_()
            predictor.get_parameter("bbox_pred.bias").copy_(swapped([deltas], swap)[0])
            predictor.get_parameter("cls_score.bias").copy_(torch.tensor(probabilities).log())
    return heads


def pyramid() -> Pyramid:
    random = torch.Generator().manual_seed(0)
    sides = [SIDE // stride for stride in STRIDES]
    maps = {
        level: torch.randn(1, SMALL.pyramid_channels, side, side, generator=random, requires_grad=True)
        for level, side in zip(LEVELS, sides, strict=False)
    }
    return Pyramid(maps, torch.float32, ((SIDE, SIDE),))


def chosen(swap: bool = False) -> tuple[Matches, Target]:
    labels = torch.tensor(LABELS)
    target = Target(swapped([OBJECT], swap), torch.tensor([1]))
    return Matches(swapped(PROPOSALS, swap), labels, torch.zeros_like(labels)), target


def test_the_first_stage_trains_on_what_overlaps_an_object_by_half() -> None:
    _, target = chosen()
    (found,) = training_boxes([torch.tensor(PROPOSALS)], [target], SMALL)
    assert found.boxes.tolist() == [*PROPOSALS, OBJECT]
    assert found.labels.tolist() == [*LABELS, 1]


@pytest.mark.parametrize("swap", [False, True])
def test_each_stage_trains_on_the_refined_boxes_at_its_own_overlap_and_weights(swap: bool) -> None:
    """The boxes' middles are 32, 39, 25 and 44, the object's is 40; overlaps as the stages find them:

    stage 1: 0.55, 0.76, 0.38, 0.67 (needs 0.5). Stage 2, all 8 further right and as high as the object: 1, 0.70, 0.70,
    0.54 (0.6: the third is on the object now, the fourth no more). Stage 3, 2 further right and 38 high: 0.86, 0.61,
    0.74, 0.46 (0.7: the second is not, which it would be at 0.6).
    """
    matches, target = chosen(swap)
    losses = constant_heads(swap).losses(pyramid(), [matches], [target])
    low = math.log(1 / 0.95)
    off = {  # |predicted - wanted| of the boxes on the object
        1: [0, 2 - 10 / 40, 2 + 10 * 4 / 40],
        2: [1 - 0, 1 + 20 * 7 / 40, abs(1 - 20 * 7 / 40)] + 3 * [10 * low],
        3: [abs(-3 + 30 * 2 / 40), 3 + 30 * 5 / 40] + 2 * [15 * low],
    }
    on_object = {1: 3, 2: 3, 3: 2}
    for stage, probabilities in enumerate(PROBABILITIES, start=1):
        number = on_object[stage]
        wanted = -(number * math.log(probabilities[1]) + (4 - number) * math.log(probabilities[3])) / 4
        assert losses[f"box_class_{stage}"].item() == pytest.approx(wanted, rel=1e-5)
        assert losses[f"box_regression_{stage}"].item() == pytest.approx(sum(off[stage]) / 4, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_third_of_each_stages_gradient_reaches_the_pyramid_and_all_of_it_the_stage(stage: int) -> None:
    torch.manual_seed(0)
    heads, maps = CascadeHeads(SMALL, CLASSES, "none"), pyramid()
    boxes = torch.tensor([OBJECT, [21.0, 20.0, 61.0, 60.0], [80.0, 80.0, 120.0, 120.0]])
    labels = torch.tensor([1, 1, BACKGROUND])
    with torch.no_grad():
        for index in range(3):  # boxes stay where they are
            heads.get_parameter(f"stages.{index}.predictor.bbox_pred.weight").zero_()
    _, target = chosen()
    loss = heads.losses(maps, [Matches(boxes, labels, torch.zeros_like(labels))], [target])[f"box_class_{stage}"]
    own = list(heads.get_submodule(f"stages.{stage - 1}.head").parameters())
    found = torch.autograd.grad(loss, [maps.maps["scale2"], *own])
    logits, _ = heads.stages[stage - 1](heads.pool(maps, [boxes]))
    plain = F.cross_entropy(logits, torch.tensor([1, 1, CLASSES]))
    wanted = torch.autograd.grad(plain, [maps.maps["scale2"], *own])
    torch.testing.assert_close(loss, plain)
    assert wanted[0].abs().max() > 0
    torch.testing.assert_close(found[0], wanted[0] / 3)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_the_test_takes_the_last_stages_boxes_and_the_mean_of_the_probabilities() -> None:
    with torch.no_grad():
        (found,) = constant_heads().candidates(pyramid(), [torch.tensor(PROPOSALS[:1])])
    assert found.labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.2, 0.3, 0.2]))
    # [12, 24, 52, 56] → [20, 20, 60, 60] → [22, 21, 62, 59] → [18, 21, 58, 59]
    torch.testing.assert_close(found.boxes, torch.tensor([[18.0, 21.0, 58.0, 59.0]]).expand(3, 4))
