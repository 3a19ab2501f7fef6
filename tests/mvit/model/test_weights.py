"""Weights load from every published naming, and nothing that does not fit is passed over."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mvit.model.backbone import MViT
from mvit.model.convert import export_names, import_names
from mvit.variants import Variant, create_model
from mvit.weights import LoadReport, load_weights

SMALL = Variant("small_test", 24, (1, 1, 2, 1), 1)


def small_model(seed: int = 0, **options: object) -> MViT:
    torch.manual_seed(seed)
    return create_model(SMALL, **({"num_classes": 5, "input_size": (64, 64)} | options))


def state_of(model: MViT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: MViT, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrapper", [None, "model_state", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dicts_load_in_any_usual_wrapping(wrapper: str | None, prefix: str) -> None:
    state = state_of(small_model(1))
    content: dict[str, object] = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "cfg": "TRAIN: …"}
    model = small_model(2)
    report = load_weights(model, content)
    assert_same(model, state)
    assert report == LoadReport("official", tuple(state), (), (), ())


@pytest.mark.parametrize("suffix", [".safetensors", ".pyth", ".pt"])
def test_files_load(tmp_path: Path, suffix: str) -> None:
    state = state_of(small_model(1))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model_state": state, "epoch": 1, "cfg": "text"}, path)
    assert_same(create_model(SMALL, 5, (64, 64), weights=path), state)


def test_convolutions_with_a_time_axis_of_one_load() -> None:
    """Published image checkpoints store them so: official code squeezes them, SlowFast's image models have them."""
    state = state_of(small_model(1))
    five = {name: tensor.unsqueeze(2) if tensor.ndim == 4 else tensor for name, tensor in state.items()}
    model = small_model(2)
    report = load_weights(model, {"model_state": five})
    assert_same(model, state)
    assert report.resized == ()


@pytest.mark.parametrize("expand", ["attention", "mlp"])
def test_timm_names_go_out_and_come_back(expand: str) -> None:
    state = state_of(small_model(1, expand=expand, class_token=True))
    theirs = export_names(state, "timm")
    shortcut = "shortcut_proj_attn" if expand == "attention" else "shortcut_proj_mlp"
    stages = (
        ("1.blocks.0", "2.blocks.0", "3.blocks.0")
        if expand == "attention"
        else ("0.blocks.0", "1.blocks.0", "2.blocks.1")
    )
    assert {name for name in theirs if "shortcut" in name and name.endswith("weight")} == {
        f"stages.{place}.{shortcut}.weight" for place in stages
    }
    naming, back = import_names(theirs)
    assert naming == "timm"
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_official_names_are_ours_and_clips_have_no_timm_names() -> None:
    state = state_of(small_model(1, input_size=(4, 32, 32)))
    assert list(export_names(state, "official")) == list(state)
    with pytest.raises(ValueError, match="timm has no video MViTv2"):
        export_names(state, "timm")
    with pytest.raises(ValueError, match="naming='keras'"):
        export_names(state, "keras")


def test_weights_of_another_resolution_load_with_tables_resized_and_reported() -> None:
    """224 → 384 px: every relative table and the absolute positions, nothing else."""
    state = state_of(small_model(1, input_size=(224, 224), absolute_positions=True, class_token=True))
    model = small_model(2, input_size=(384, 384), absolute_positions=True, class_token=True)
    report = load_weights(model, state)
    tables = {name for name in state if "rel_pos" in name} | {"pos_embed"}
    assert {name for name, _, _ in report.resized} == tables
    shapes = {name: (old, new) for name, old, new in report.resized}
    assert shapes["blocks.0.attn.rel_pos_h"] == ((111, 24), (191, 24))
    assert shapes["pos_embed"] == ((1, 1 + 56 * 56, 24), (1, 1 + 96 * 96, 24))
    assert "blocks.0.attn.rel_pos_h: [111, 24] -> [191, 24]" in report.summary()
    assert_same_except(model, state, tables)
    # Resizing beforehand or at run time is the same function, where no floor comes in between
    images = torch.randn(1, 3, 384, 384)
    at_run_time = small_model(3, input_size=(224, 224), absolute_positions=True, class_token=True)
    load_weights(at_run_time, state)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), at_run_time.eval()(images), atol=1e-5)


def assert_same_except(model: MViT, state: dict[str, Tensor], names: set[str]) -> None:
    for name, tensor in model.state_dict().items():
        assert (name in names) or torch.equal(tensor, state[name]), name


def test_clips_of_another_size_load_with_tables_resized() -> None:
    state = state_of(small_model(1, input_size=(8, 32, 32), absolute_positions="separable"))
    model = small_model(2, input_size=(4, 48, 64), absolute_positions="separable")
    resized = {name: new for name, _, new in load_weights(model, state).resized}
    assert resized["pos_embed_temporal"] == (1, 2, 24)
    assert resized["pos_embed_spatial"] == (1, 12 * 16, 24)
    assert resized["blocks.0.attn.rel_pos_t"] == (3, 24)


def test_a_head_for_other_classes_is_refused_unless_a_new_one_is_allowed() -> None:
    state = state_of(small_model(1, num_classes=7))
    model = small_model(2)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"for 7 classes, the model for 5: give num_classes=7, or allow_new_head=True"):
        load_weights(model, state)
    assert_same(model, before)
    report = load_weights(model, state, allow_new_head=True)
    assert report.missing == report.unexpected == ("head.projection.weight", "head.projection.bias")
    assert "start anew: head.projection.weight, head.projection.bias" in report.summary()
    assert_same_except(model, state, set(report.missing))
    assert model.head.projection.bias.eq(0).all()
    assert not torch.equal(model.head.projection.weight, before["head.projection.weight"])


def test_weights_without_a_head_are_refused_unless_a_new_one_is_allowed() -> None:
    state = {name: tensor for name, tensor in state_of(small_model(1)).items() if not name.startswith("head.")}
    with pytest.raises(ValueError, match=r"(?s)head.projection.weight \[5, 192\].*allow_new_head=True"):
        load_weights(small_model(2), state)
    report = load_weights(small_model(2), state, allow_new_head=True)
    assert report.missing == ("head.projection.weight", "head.projection.bias")
    assert report.unexpected == ()


def test_a_fitting_head_is_kept_although_a_new_one_is_allowed() -> None:
    state = state_of(small_model(1))
    model = small_model(2)
    assert load_weights(model, state, allow_new_head=True).missing == ()
    assert_same(model, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": True}, r"(?s)Unexpected:\n  cls_token \[1, 1, 24\].*class_token=True"),
        ({"expand": "mlp"}, r'(?s)blocks.0.proj.weight \[48, 24\].*expand="mlp"'),
        ({"absolute_positions": True}, r"(?s)pos_embed \[1, 256, 24\].*absolute_positions"),
        ({"relative_positions": False}, r"(?s)Missing:\n  blocks.0.attn.rel_pos_h \[31, 24\].*relative_positions"),
        ({"qkv_bias": False}, r"(?s)blocks.0.attn.qkv.bias \[72\].*qkv_bias=False"),
        (
            {"input_size": (4, 64, 64)},
            r"(?s)patch_embed.proj.weight: \[24, 3, 3, 7, 7\], the model has \[24, 3, 7, 7\].*for clips",
        ),
    ],
)
def test_weights_of_another_model_are_refused_with_keys_shapes_and_the_option(
    options: dict[str, object], message: str
) -> None:
    model = small_model(2)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, state_of(small_model(1, **options)))
    assert_same(model, before)


def test_missing_unexpected_and_misshapen_entries_are_all_listed() -> None:
    state = state_of(small_model(1))
    del state["blocks.2.mlp.fc1.bias"]
    state["blocks.9.norm1.weight"] = torch.zeros(4)
    state["norm.weight"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        load_weights(small_model(2), state)
    for line in (
        "norm.weight: [7], the model has [192]",
        "blocks.2.mlp.fc1.bias [384]",
        "blocks.9.norm1.weight [4]",
        "small_test, which was left unchanged",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, "not MViTv2 weights.*conv1.weight, fc.bias"),
        ({}, "no tensors at all"),
        ({"patch_embed.proj.weight": 3}, "entry 'patch_embed.proj.weight' is a int, not a tensor"),
    ],
)
def test_dictionaries_that_are_no_mvit_weights_are_refused(content: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(small_model(), content)


DETECTOR = {
    "proposal_generator.rpn_head.conv.weight": (8, 8, 3, 3),
    "proposal_generator.anchor_generator.cell_anchors.0": (3, 4),
    "roi_heads.box_predictor.cls_score.weight": (81, 8),
    "roi_heads.mask_head.mask_fcn1.bias": (8,),
    "backbone.fpn_lateral2.weight": (8, 24, 1, 1),
    "backbone.fpn_output2.bias": (8,),
    "backbone.top_block.p6.weight": (8, 8, 3, 3),
    "pixel_mean": (3, 1, 1),
    "pixel_std": (3, 1, 1),
}
NORMS = {f"scale{stage}_norm.{leaf}": (24 * 2 ** (stage - 2),) for stage in range(2, 6) for leaf in ("weight", "bias")}
OF_CLASSIFIER = ("head.projection.weight", "head.projection.bias", "norm.weight", "norm.bias", "cls_token")


def detector_state(state: dict[str, Tensor], prefix: str = "backbone.bottom_up.") -> dict[str, Tensor]:
    """Return the checkpoint of a detectron2 detector whose backbone has these weights."""
    backbone = {name: tensor for name, tensor in state.items() if name not in OF_CLASSIFIER}
    norms = {name: torch.ones(shape) for name, shape in NORMS.items()}
    parts = {name: torch.ones(shape) for name, shape in DETECTOR.items()} if prefix else {}
    if prefix == "bottom_up.":  # the state dict of a detector's pyramid alone
        parts = {name.removeprefix("backbone."): parts[name] for name in parts if name.startswith("backbone.")}
    return {prefix + name: tensor for name, tensor in (backbone | norms).items()} | parts


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "bottom_up.", ""])
def test_the_backbone_of_a_detectron2_detector_loads_into_a_classifier(prefix: str, class_token: bool) -> None:
    state = state_of(small_model(1))
    theirs = detector_state(state, prefix)
    model = small_model(2, class_token=class_token)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"(?s)detectron2 names.*Missing:.*norm.*head.*allow_new_head=True.*no final"):
        load_weights(model, theirs)
    assert_same(model, before)
    for name in ("head.projection.weight", "norm.bias"):
        model.get_parameter(name).data.fill_(3.0)
    report = load_weights(model, {"model": theirs, "__author__": "somebody"}, allow_new_head=True)
    assert report.naming == "detectron2"
    assert set(report.missing) == {name for name in OF_CLASSIFIER if name in before}
    assert_same_except(model, state, set(report.missing))
    assert model.norm.weight.eq(1).all()
    assert model.norm.bias.eq(0).all()
    assert 0 < model.head.projection.weight.abs().max() < 1
    if class_token:
        assert not torch.equal(model.state_dict()["cls_token"], before["cls_token"])
    others = {name.removeprefix(prefix) for name in theirs} - state.keys()
    assert set(report.unexpected) == others
    if prefix == "backbone.bottom_up.":
        for count in ("2 of scale2_norm", "2 of proposal_generator", "2 of roi_heads", "2 of fpn", "1 of top_block"):
            assert count in report.summary()
        assert "1 of pixel_mean, 1 of pixel_std" in report.summary()


def test_a_tensor_that_no_detector_has_is_refused() -> None:
    """Beside the known parts of a detector nothing is passed over, inside its backbone nothing at all."""
    theirs = detector_state(state_of(small_model(1)))
    for name in ("backbone.bottom_up.blocks.9.norm1.weight", "something_else.weight", "pixel_meaning"):
        with pytest.raises(ValueError, match=rf"(?s)Unexpected:\n  {name.removeprefix('backbone.bottom_up.')} \[4\]"):
            load_weights(small_model(2), theirs | {name: torch.zeros(4)}, allow_new_head=True)
    del theirs["backbone.bottom_up.blocks.2.norm1.weight"]
    with pytest.raises(ValueError, match=r"(?s)Missing:\n  blocks.2.norm1.weight \[48\]"):
        load_weights(small_model(2), theirs, allow_new_head=True)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("positions", [False, True, "separable"])
def test_slowfasts_video_checkpoints_load(positions: bool | str, class_token: bool) -> None:
    """5-D pools, three tables of relative positions, joint or separable absolute ones, with the class token's own."""
    options: dict[str, object] = {"input_size": (8, 32, 32), "absolute_positions": positions}
    options |= {"class_token": class_token, "readout": "mean_then_norm"}
    state = state_of(small_model(1, **options))
    assert state["blocks.0.attn.pool_q.weight"].shape == (24, 1, 3, 3, 3)
    assert "blocks.0.attn.rel_pos_t" in state
    assert ("pos_embed_class" in state) == (positions == "separable" and class_token)
    assert ("cls_token" in state) == class_token
    model = small_model(2, **options)
    content = {"epoch": 199, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN: …"}
    report = load_weights(model, content)
    assert_same(model, state)
    assert (report.naming, report.resized, report.missing) == ("official", (), ())


def test_torchvisions_names_are_read_and_only_shapes_of_positions_differ() -> None:
    """Every kind of name that torchvision's video models have, made from ours; the class token is (C,) there."""
    options: dict[str, object] = {"input_size": (8, 32, 32), "absolute_positions": "separable"}
    state = state_of(small_model(1, **options))
    theirs = {torchvision_name(name): tensor for name, tensor in state.items()}
    for name in ("class_token", "class_pos"):
        theirs[f"pos_encoding.{name}"] = theirs[f"pos_encoding.{name}"].flatten()
    for name in ("spatial_pos", "temporal_pos"):
        theirs[f"pos_encoding.{name}"] = theirs[f"pos_encoding.{name}"][0]
    model = small_model(2, **options)
    report = load_weights(model, theirs)
    assert report.naming == "torchvision"
    assert_same(model, state)


def torchvision_name(name: str) -> str:
    """Spell one of our names as torchvision does."""
    for ours, their in (
        (r"^patch_embed\.proj", "conv_proj"),
        (r"^cls_token$", "pos_encoding.class_token"),
        (r"^pos_embed_(\w+)$", r"pos_encoding.\1_pos"),
        (r"attn\.proj", "attn.project.0"),
        (r"attn\.(pool_[qkv])", r"attn.\1.pool"),
        (r"attn\.norm_([qkv])", r"attn.pool_\1.norm_act.0"),
        (r"^(blocks\.\d+)\.proj", r"\1.project"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
        (r"^head\.projection", "head.1"),
    ):
        name, found = re.subn(ours, their, name)
        if found:
            return name
    return name


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_and_absent_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load_weights(small_model(), path)
    whole = tmp_path / f"whole_{name}"
    if name.endswith("safetensors"):
        save_file(state_of(small_model()), whole)
    else:
        torch.save(state_of(small_model()), whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        load_weights(small_model(), path)


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = create_model(SMALL, 5, (64, 64))
    with pytest.raises(ValueError, match="meta device"):
        load_weights(model, state_of(small_model()))
