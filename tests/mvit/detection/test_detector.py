"""Detectors train on any batch, in any precision, and find what they were trained on."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from mvit.detection.boxes import Target
from mvit.detection.config import DetectionConfig
from mvit.detection.detections import Detections
from mvit.detection.detector import create_detector
from mvit.detection.norm import LayerNorm2d
from mvit.detection.proposals import ProposalNetwork
from tests.mvit.detection.tiny import SMALL, TinyBackbone, empty_target, shapes

KINDS = ("mask_rcnn", "cascade_mask_rcnn")
SIDE = 96


def _losses(detector: Any, *args: Any) -> dict[str, Tensor]:
    losses = detector(*args)
    assert isinstance(losses, dict)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_named_scalars_that_train_every_parameter(kind: Any) -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), kind, 3, SMALL).train()
    losses = _losses(detector, *shapes(2, SIDE, seed=0))
    stages = [""] if kind == "mask_rcnn" else ["_1", "_2", "_3"]
    boxes = [name + stage for stage in stages for name in ("box_class", "box_regression")]
    assert sorted(losses) == sorted(["rpn_objectness", "rpn_box", *boxes, "mask"])
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    still = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    assert all(p.grad is not None and p.grad.any() for p in detector.box_heads.parameters() if p.ndim > 1)


def test_norms_in_heads_and_pyramid_are_trained_too() -> None:
    torch.manual_seed(0)
    normed = SMALL.model_copy(update={"head_norm": "layer", "pyramid_norm": "layer"})
    detector = create_detector(TinyBackbone(), "mask_rcnn", 3, normed).train()
    norms = [name for name, module in detector.pyramid.fpn.named_modules() if isinstance(module, LayerNorm2d)]
    assert len(norms) == 8  # of each level, behind the lateral convolution and behind the one after the sum
    sum(_losses(detector, *shapes(2, SIDE, seed=0)).values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_object_gives_every_parameter_a_finite_gradient(kind: Any) -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), kind, 3, SMALL).train()
    images, sizes, _ = shapes(2, SIDE, seed=0, objects=0)
    losses = _losses(detector, images, sizes, [empty_target(SIDE)] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    assert float(losses["mask"].detach()) == 0.0
    sum(losses.values(), torch.zeros(())).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("mask_branch"):
            assert not parameter.grad.any(), name


def test_an_image_without_objects_beside_one_with_some_is_trained_on() -> None:
    detector = create_detector(TinyBackbone(), "cascade_mask_rcnn", 3, SMALL).train()
    images, sizes, targets = shapes(2, SIDE, seed=0)
    losses = _losses(detector, images, sizes, [targets[0], empty_target(SIDE)])
    assert all(loss.isfinite() for loss in losses.values())
    assert float(losses["mask"].detach()) > 0


def test_no_proposals_and_no_objects_leave_finite_losses_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = create_detector(TinyBackbone(), "cascade_mask_rcnn", 3, SMALL).train()
    monkeypatch.setattr(detector.rpn, "score_thresh", 2.0)
    images, sizes, _ = shapes(1, SIDE, seed=0, objects=0)
    losses = _losses(detector, images, sizes, [empty_target(SIDE)])
    assert float(losses["box_class_1"].detach()) == 0.0
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    with torch.no_grad():
        (found,) = detector.eval()(images, sizes)
    assert len(found) == 0
    assert found.pasted().shape == (0, SIDE, SIDE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", ["autocast", "parameters"])
def test_boxes_and_losses_are_fp32_in_bf16(kind: Any, half: str) -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), kind, 3, SMALL)
    images, sizes, targets = shapes(2, SIDE, seed=0)
    torch.manual_seed(1)
    exact = _losses(detector.train(), images, sizes, targets)
    if half == "parameters":
        detector.bfloat16()
        images = images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        torch.manual_seed(1)
        losses = _losses(detector.train(), images, sizes, targets)
        (first, _) = detector.eval()(images, sizes)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        # Other proposals are drawn: near, not equal
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.25, abs=0.05), name
    assert first.boxes.dtype == first.scores.dtype == first.masks.dtype == torch.float32


def test_activations_that_are_not_numbers_reach_the_loss_and_crash_nothing() -> None:
    detector = create_detector(TinyBackbone(), "cascade_mask_rcnn", 3, SMALL)
    images, sizes, targets = shapes(1, SIDE, seed=0)
    images[0, 0, 0, 0] = float("nan")
    losses = _losses(detector.train(), images, sizes, targets)
    assert not sum(losses.values(), torch.zeros(())).isfinite()
    with torch.no_grad():
        detector.eval()(images, sizes)


def test_crowds_are_left_out_of_training() -> None:
    detector = create_detector(TinyBackbone(), "mask_rcnn", 3, SMALL).train()
    images, sizes, (target,) = shapes(1, SIDE, seed=0)
    alone = Target(target.boxes[:1], target.labels[:1], target.masks[:1])
    marked = Target(target.boxes, target.labels, target.masks, torch.tensor([False, True]))
    torch.manual_seed(0)
    wanted = _losses(detector, images, sizes, [alone])
    torch.manual_seed(0)
    assert _losses(detector, images, sizes, [marked]) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_padding_beyond_the_image_is_never_part_of_a_box(kind: Any) -> None:
    torch.manual_seed(0)
    loose = SMALL.model_copy(update={"score_threshold": 0.0})
    detector = create_detector(TinyBackbone(), kind, 3, loose).eval()
    with torch.no_grad():
        found = detector(torch.randn(2, 3, 70, 100), torch.tensor([[70, 50], [33, 100]]))
    for each, (height, width) in zip(found, ((70, 50), (33, 100)), strict=True):
        assert isinstance(each, Detections)
        assert each.size == (height, width)
        assert len(each) > 0
        assert (each.boxes >= 0).all()
        assert (each.boxes[:, 2] <= width).all()
        assert (each.boxes[:, 3] <= height).all()
        assert ((each.masks >= 0) & (each.masks <= 1)).all()


def test_padding_an_image_further_does_not_move_what_is_found() -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), "mask_rcnn", 3, SMALL.model_copy(update={"score_threshold": 0.0})).eval()
    image = torch.randn(1, 3, 64, 64)
    wide = torch.nn.functional.pad(image, (0, 256, 0, 128))
    with torch.no_grad():
        pyramid, _ = detector.candidates(image, [[64, 64]])
        wider, _ = detector.candidates(wide, [[64, 64]])
        boxes = [torch.tensor([[4.0, 6.0, 30.0, 40.0]])]
        torch.testing.assert_close(detector.mask_branch.pool(pyramid, boxes), detector.mask_branch.pool(wider, boxes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.tensor([[5.0, 5.0, 5.0, 9.0]])}, "no area"),
        ({"boxes": torch.tensor([[5.0, 5.0, 8.0, float("nan")]])}, "not finite"),
        ({"boxes": torch.tensor([[5.0, 5.0, 8.0, 9.0]]).bfloat16()}, "float32"),
        ({"labels": torch.tensor([3])}, "label 3 is not in 0 … 2"),
        ({"masks": torch.zeros(2, SIDE, SIDE)}, "masks .* must be"),
    ],
)
def test_targets_that_cannot_be_right_are_refused(change: dict[str, Tensor], words: str) -> None:
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 8.0, 9.0]]),
        "labels": torch.tensor([0]),
        "masks": torch.zeros(1, SIDE, SIDE),
    }
    detector = create_detector(TinyBackbone(), "mask_rcnn", 3, SMALL).train()
    with pytest.raises(ValueError, match=words):
        detector(torch.randn(1, 3, SIDE, SIDE), [[SIDE, SIDE]], [Target(**target | change)])


def test_wrong_arguments_are_named() -> None:
    detector = create_detector(TinyBackbone(), "mask_rcnn", 3, SMALL).train()
    images = torch.randn(1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="one target for each of the 1 images, got none"):
        detector(images, [[SIDE, SIDE]])
    with pytest.raises(ValueError, match="none larger than the batch's 96 x 96"):
        detector(images, [[SIDE, SIDE + 1]], [empty_target(SIDE)])
    with pytest.raises(ValueError, match="evaluation mode"):
        detector.eval()(images, [[SIDE, SIDE]], [empty_target(SIDE)])
    with pytest.raises(ValueError, match="'yolo' must be one of 'mask_rcnn', 'cascade_mask_rcnn'"):
        create_detector(TinyBackbone(), "yolo", 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_classes=0"):
        create_detector(TinyBackbone(), "mask_rcnn", 0)
    with pytest.raises(ValueError, match="out_channels"):
        create_detector(torch.nn.Conv2d(3, 3, 1), "mask_rcnn", 3)


def test_anchors_have_the_sizes_and_shapes_asked_for_at_every_level() -> None:
    config = DetectionConfig(anchor_sizes=(8, 16, 32, 64, 128), anchor_ratios=(0.5, 2.0))
    network = ProposalNetwork(config, 1)
    assert network.head.cls_logits.out_channels == 2  # pyright: ignore[reportAttributeAccessIssue]
    maps = [torch.zeros(1, 1, side, side) for side in (16, 8, 4, 2, 1)]
    anchors = network.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)[0]
    widths, heights = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    sizes = torch.cat(
        [
            torch.full((2 * side * side,), size)
            for side, size in zip((16, 8, 4, 2, 1), (8.0, 16.0, 32.0, 64.0, 128.0), strict=True)
        ]
    )
    torch.testing.assert_close((widths * heights).sqrt(), sizes)
    torch.testing.assert_close(heights / widths, torch.tensor([0.5, 2.0]).repeat(len(anchors) // 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("anchor_sizes", (1, 2, 3)),
        ("anchor_sizes", (16, 8, 32, 64, 128)),
        ("anchor_ratios", ()),
        ("anchor_ratios", (1.0, 1.0)),
    ],
)
def test_anchors_that_make_no_sense_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key} .* must be .*positive and"):
        DetectionConfig(**{key: value})
