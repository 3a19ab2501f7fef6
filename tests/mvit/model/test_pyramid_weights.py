"""Backbones take weights of classifiers, detectors and backbones, and the report accounts for every tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mvit.detection.config import DetectionConfig
from mvit.detection.detector import create_detector
from mvit.model.backbone import MViT
from mvit.model.convert import detector_part, export_names
from mvit.model.pyramid import StagePyramid
from mvit.variants import Variant, create_backbone, create_model
from mvit.weights import LoadReport, load_weights

SMALL = Variant("small_test", 24, (1, 2, 3, 2), 1)
NORMS = tuple(f"scale{stage}_norm.{leaf}" for stage in (2, 3, 4, 5) for leaf in ("weight", "bias"))
HEAD = ("norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias")


def backbone_of(seed: int, **options: Any) -> StagePyramid:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"input_size": (64, 64), "window_size": 16}
    return create_backbone(SMALL, **(sizes | options))


def classifier_of(seed: int, **options: Any) -> MViT:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"input_size": (64, 64)}
    return create_model(SMALL, 5, **(sizes | options))


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_accounted(report: LoadReport, model: StagePyramid, state: dict[str, Tensor]) -> None:
    """Every parameter was loaded or starts anew, every tensor was loaded or is not used; what was loaded is equal."""
    names = set(model.state_dict())
    assert {*report.loaded} | {*report.missing} == names
    assert not {*report.loaded} & {*report.missing}
    assert {*report.loaded} | {*report.unexpected} == set(state)
    assert not {*report.loaded} & {*report.unexpected}
    changed = {name for name, _, _ in report.resized}
    assert changed <= {*report.loaded}
    for name in {*report.loaded} - changed:
        assert torch.equal(model.state_dict()[name], state[name]), name


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("expand", ["attention", "mlp"])
def test_our_own_classifier_loads_with_every_key_explained(class_token: bool, positions: bool, expand: str) -> None:
    options: dict[str, object] = {"absolute_positions": positions, "expand": expand}
    state = state_of(classifier_of(1, class_token=class_token, **options))
    backbone = backbone_of(2, **options)
    for name in NORMS:
        backbone.get_parameter(name).data.fill_(3.0)
    report = load_weights(backbone, {"model_state": state, "epoch": 3})
    assert_accounted(report, backbone, state)
    assert report.missing == NORMS
    assert {*report.unexpected} == {*HEAD, *(["cls_token"] if class_token else [])}
    for name in NORMS:
        assert backbone.get_parameter(name).eq(1.0 if name.endswith("weight") else 0.0).all()
    cut = [("pos_embed", (1, 257, 24), (1, 256, 24))] if class_token and positions else []
    assert [*report.resized] == cut
    if cut:
        assert torch.equal(backbone.state_dict()["pos_embed"], state["pos_embed"][:, 1:])
    summary = report.summary()
    assert "start anew: scale2_norm.weight" in summary
    assert "2 of norm, 2 of head" in summary
    assert ("1 of cls_token" in summary) == class_token


def test_a_classifier_of_another_resolution_loads_with_its_tables_resized() -> None:
    options: dict[str, object] = {"class_token": True, "absolute_positions": True}
    state = state_of(classifier_of(1, input_size=(96, 96), **options))
    backbone = backbone_of(2, absolute_positions=True)
    report = load_weights(backbone, state)
    assert_accounted(report, backbone, state)
    tables = {name for name in backbone.state_dict() if ".rel_pos_" in name}
    assert {name for name, _, _ in report.resized} == tables | {"pos_embed"}
    shapes = {name: (old, new) for name, old, new in report.resized}
    assert shapes["blocks.0.attn.rel_pos_h"] == ((47, 24), (31, 24))
    assert shapes["pos_embed"] == ((1, 1 + 24 * 24, 24), (1, 16 * 16, 24))


def test_positions_of_a_classifier_of_oblong_images_load() -> None:
    """577 = 1 + 16 · 36 rows are a class token and the model's own grid, not a guessed square of 24."""
    state = state_of(classifier_of(1, input_size=(64, 144), class_token=True, absolute_positions=True))
    backbone = backbone_of(2, input_size=(64, 144), absolute_positions=True)
    load_weights(backbone, state)
    assert torch.equal(backbone.state_dict()["pos_embed"], state["pos_embed"][:, 1:])


def test_timms_and_five_dimensional_classifiers_load() -> None:
    state = state_of(classifier_of(1))
    for theirs, naming in (
        (export_names(state, "timm"), "timm"),
        ({name: tensor.unsqueeze(2) if tensor.ndim == 4 else tensor for name, tensor in state.items()}, "official"),
    ):
        backbone = backbone_of(2)
        report = load_weights(backbone, theirs)
        assert_accounted(report, backbone, state)
        assert (report.naming, report.missing) == (naming, NORMS)


def our_detector(seed: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    small = DetectionConfig(pyramid_channels=16, box_channels=8, box_features=32, mask_channels=8)
    return create_detector(backbone_of(seed, **options), "cascade_mask_rcnn", 3, small)


@pytest.mark.parametrize("wrapped", ["detector", "pyramid"])
def test_our_own_detectors_give_their_backbone_with_its_norms(wrapped: str, tmp_path: Path) -> None:
    """Names are `pyramid.backbone.…` of a whole detector, `backbone.…` of the pyramid or of others' wrappers."""
    whole = our_detector(1).requires_grad_(False)
    for parameter in whole.parameters():
        parameter.normal_()
    state = state_of(whole if wrapped == "detector" else whole.get_submodule("pyramid"))
    start = "pyramid.backbone." if wrapped == "detector" else "backbone."
    ours = {name.removeprefix(start): tensor for name, tensor in state.items()}
    assert set(backbone_of(2).state_dict()) < set(ours)
    file = tmp_path / "detector.safetensors"
    save_file(state, file)
    for source in (state, {"model_state": state}, {f"module.{name}": value for name, value in state.items()}, file):
        backbone = backbone_of(2, attention="full")
        report = load_weights(backbone, source)
        assert report.naming == "detector"
        assert_accounted(report, backbone, ours)
        assert report.missing == report.resized == ()
        parts = {"fpn", "rpn", "box_heads", "mask_branch"} if wrapped == "detector" else {"fpn"}
        assert {detector_part(name) for name in report.unexpected} == parts
        assert f"{sum('fpn.' in name for name in state)} of fpn" in report.summary()


def test_a_detector_of_another_size_or_with_an_unknown_part_is_refused() -> None:
    state = state_of(our_detector(1, expand="mlp"))
    with pytest.raises(ValueError, match=r'\(detector names\) does not fit small_test(.|\n)*try expand="mlp"'):
        load_weights(backbone_of(2), state)
    state = state_of(our_detector(1))
    with pytest.raises(ValueError, match=r"Unexpected:\n  extra\.weight \[2\]"):
        load_weights(backbone_of(2), state | {"extra.weight": torch.zeros(2)})
    tables = load_weights(backbone_of(2, input_size=(96, 96)), state).resized
    assert all(".rel_pos_" in name for name, _, _ in tables)
    assert tables


def test_a_classifier_takes_our_detector_s_backbone_only_with_a_new_head() -> None:
    state = state_of(our_detector(1))
    with pytest.raises(ValueError, match=r"The weights have no head: give allow_new_head=True(.|\n)*no final norm"):
        load_weights(classifier_of(2), state)
    classifier = classifier_of(2, class_token=True)
    report = load_weights(classifier, state, allow_new_head=True)
    assert report.naming == "detector"
    assert {*report.missing} == {*HEAD, "cls_token"}
    assert {*report.loaded} | {*report.missing} == set(classifier.state_dict())
    start = "pyramid.backbone."
    assert {*report.unexpected} == {name.removeprefix(start) for name in state} - {*report.loaded}
    for name in report.loaded:
        assert torch.equal(classifier.state_dict()[name], state[start + name])
    assert "8 of rpn" in report.summary()
    assert "2 of scale2_norm" in report.summary()


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "bottom_up.", ""])
def test_detectron2s_detectors_and_backbones_load_with_their_norms(prefix: str) -> None:
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in backbone_of(1).state_dict().items()}
    others = {"roi_heads.mask_head.mask_fcn1.bias": torch.zeros(8), "pixel_mean": torch.zeros(3, 1, 1)}
    others["backbone.fpn_lateral2.weight"] = torch.zeros(8, 24, 1, 1)
    others = others if prefix == "backbone.bottom_up." else {}
    backbone = backbone_of(2)
    report = load_weights(backbone, {"model": {prefix + name: t for name, t in state.items()} | others})
    assert report.naming == "detectron2"
    assert_accounted(report, backbone, state | others)
    assert report.missing == report.resized == ()
    if others:
        assert "not used: 1 of roi_heads, 1 of pixel_mean, 1 of fpn" in report.summary()


def test_a_backbone_loads_from_a_file_when_it_is_built(tmp_path: Path) -> None:
    state = state_of(backbone_of(1))
    torch.save({"model": state}, tmp_path / "backbone.pth")
    backbone = create_backbone(SMALL, input_size=(64, 64), window_size=16, weights=tmp_path / "backbone.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": (4, 64, 64)}, r"(?s)patch_embed.proj.weight: \[24, 3, 3, 7, 7\].*weights are for clips"),
        ({"expand": "mlp"}, r'(?s)blocks.0.proj.weight \[48, 24\].*expand="mlp"'),
        ({"absolute_positions": True}, r"(?s)Unexpected:\n  pos_embed \[1, 256, 24\].*absolute_positions"),
        ({"relative_positions": False}, r"(?s)Missing:\n  blocks.0.attn.rel_pos_h \[31, 24\].*relative_positions"),
    ],
)
def test_weights_of_another_network_are_refused(options: dict[str, object], message: str) -> None:
    backbone = backbone_of(2)
    before = state_of(backbone)
    with pytest.raises(ValueError, match=message):
        load_weights(backbone, state_of(classifier_of(1, **options)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_what_is_missing_or_unknown_in_a_backbone_is_refused() -> None:
    state = state_of(backbone_of(1))
    for name in ("scale3_norm.bias", "blocks.2.norm1.weight"):
        with pytest.raises(ValueError, match=rf"(?s)Missing:\n  {name} \[48\]"):
            load_weights(backbone_of(2), {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match=r"(?s)Unexpected:\n  blocks.9.norm1.weight \[4\]"):
        load_weights(backbone_of(2), state | {"blocks.9.norm1.weight": torch.zeros(4)})
