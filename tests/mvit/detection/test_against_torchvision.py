"""Configured like torchvision's Mask R-CNN, ours computes what it computes: labels, matching, weights, thresholds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from mvit.detection.boxes import Target
from mvit.detection.config import DetectionConfig
from mvit.detection.detector import Detector, create_detector
from mvit.detection.fpn import LEVELS
from mvit.detection.proposals import PyramidAnchors
from tests.mvit.detection.tiny import TinyBackbone, shapes

SIDE, CLASSES, WIDTH = 128, 3, 16
LIKE_TORCHVISION = DetectionConfig(
    pyramid_channels=WIDTH,
    box_features=32,
    mask_channels=WIDTH,
    roi_aligned=False,
    roi_sampling_ratio=2,
    box_loss_beta=1 / 9,
    binary_mask_targets=False,
    proposals_before_nms=200,
    proposals_before_nms_test=150,
    proposals_after_nms=100,
    proposal_batch_size=64,
    box_batch_size=48,
    score_threshold=0.2,
    nms_iou=0.4,
    detections_per_image=20,
)


def _pair() -> tuple[Detector, MaskRCNN]:
    """Return ours and torchvision's with the same weights, large enough for scores of every kind."""
    torch.manual_seed(0)
    ours = create_detector(TinyBackbone(), "mask_rcnn", CLASSES, LIKE_TORCHVISION)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "predictor" in name or "cls_logits" in name or "bbox_pred" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    ours.pyramid.out_channels = WIDTH  # pyright: ignore[reportArgumentType]
    theirs = MaskRCNN(
        ours.pyramid,
        rpn_anchor_generator=PyramidAnchors(LIKE_TORCHVISION.anchor_sizes, LIKE_TORCHVISION.anchor_ratios),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), 7, 2),
        box_head=TwoMLPHead(WIDTH * 49, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES + 1),
        box_score_thresh=0.2,
        box_nms_thresh=0.4,
        box_detections_per_img=20,
        box_batch_size_per_image=48,
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), 14, 2),
        mask_head=MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1),
        mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, CLASSES + 1),
    )
    _copy_weights(ours, theirs)
    return ours, theirs


def _copy_weights(ours: Detector, theirs: MaskRCNN) -> None:
    theirs.rpn.head.load_state_dict(ours.rpn.head.state_dict())
    head, predictor = ours.box_heads.head, ours.box_heads.predictor
    heads: Any = theirs.roi_heads
    heads.box_head.fc6.load_state_dict(head[1].state_dict())  # pyright: ignore[reportIndexIssue]
    heads.box_head.fc7.load_state_dict(head[3].state_dict())  # pyright: ignore[reportIndexIssue]
    assert ours.mask_branch is not None
    mask = ours.mask_branch.head
    for index, block in enumerate(mask.convs):
        heads.mask_head[index][0].load_state_dict(block[0].state_dict())  # pyright: ignore[reportIndexIssue]
    heads.mask_predictor.conv5_mask.load_state_dict(mask.upsample.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            # Theirs has background first, and a box and a mask for it, which nobody looks at
            getattr(heads.box_predictor.cls_score, name).copy_(getattr(predictor.cls_score, name).roll(1, 0))
            getattr(heads.box_predictor.bbox_pred, name)[4:] = getattr(predictor.bbox_pred, name)
            getattr(heads.mask_predictor.mask_fcn_logits, name)[1:] = getattr(mask.predictor, name)


def _batch() -> tuple[Tensor, list[list[int]], list[Target]]:
    images, _, targets = shapes(2, SIDE, seed=3, objects=3)
    return images, [[SIDE, SIDE], [SIDE, 100]], [targets[0], _left_of(targets[1], 100)]


def _left_of(target: Target, width: int) -> Target:
    keep = target.boxes[:, 2] <= width
    assert target.masks is not None
    return Target(target.boxes[keep], target.labels[keep], target.masks[keep])


def test_losses_equal_torchvisions() -> None:
    ours, theirs = _pair()
    images, sizes, targets = _batch()
    torch.manual_seed(5)
    losses = ours.train()(images, sizes, targets)
    theirs.train()
    truth = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.to(torch.uint8)}
        for t in targets
        if t.masks is not None
    ]
    listed = ImageList(images, [(h, w) for h, w in sizes])
    torch.manual_seed(5)
    maps = ours.pyramid(images)
    proposals, first = theirs.rpn(listed, maps, truth)
    _, second = theirs.roi_heads(maps, proposals, listed.image_sizes, truth)
    expected = {
        "rpn_objectness": first["loss_objectness"],
        "rpn_box": first["loss_rpn_box_reg"],
        "box_class": second["loss_classifier"],
        "box_regression": second["loss_box_reg"],
        "mask": second["loss_mask"],
    }
    assert isinstance(losses, dict)
    assert float(losses["box_regression"].detach()) > 0
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=lambda text, name=name: f"{name}: {text}")


def test_detections_equal_torchvisions() -> None:
    ours, theirs = _pair()
    images, sizes, _ = _batch()
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        found = ours(images, sizes)
        listed = ImageList(images, [(h, w) for h, w in sizes])
        maps = ours.pyramid(images)
        proposals, _ = theirs.rpn(listed, maps)
        expected, _ = theirs.roi_heads(maps, proposals, listed.image_sizes)
    for mine, other in zip(found, expected, strict=True):
        assert len(mine) > 3
        assert len(set(mine.labels.tolist())) > 1
        torch.testing.assert_close(mine.boxes, other["boxes"])
        torch.testing.assert_close(mine.scores, other["scores"])
        assert mine.labels.tolist() == (other["labels"] - 1).tolist()
        torch.testing.assert_close(mine.masks, other["masks"][:, 0])


@pytest.mark.parametrize("setting", ["roi_aligned", "box_loss_beta", "binary_mask_targets"])
def test_the_published_settings_differ_from_torchvisions(setting: str) -> None:
    """The equality above would not notice a setting that nobody reads."""
    ours, _ = _pair()
    published = getattr(DetectionConfig(), setting)
    other = create_detector(
        TinyBackbone(), "mask_rcnn", CLASSES, LIKE_TORCHVISION.model_copy(update={setting: published})
    )
    other.load_state_dict(ours.state_dict())
    torch.manual_seed(5)
    first = ours.train()(*_batch())
    torch.manual_seed(5)
    second = other.train()(*_batch())
    assert first != second
