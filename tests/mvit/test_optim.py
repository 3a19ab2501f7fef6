"""Weight decay and learning-rate scales reach exactly the parameters the paper's recipe says."""

from typing import Any, get_args

import pytest
import torch
from torch import nn

from mvit.detection.config import DetectionConfig, DetectorKind
from mvit.detection.detector import create_detector
from mvit.model.block import DropPath
from mvit.optim import OptimConfig, build_optimizer, parameter_groups
from mvit.variants import Variant, create_backbone, create_model

TINY = Variant("test", embed_dim=16, depths=(1, 1, 1, 1), num_heads=1)


def _model() -> nn.Module:
    with torch.device("meta"):
        return create_model(TINY, num_classes=3, input_size=(32, 32), class_token=True, absolute_positions=True)


def test_biases_and_norms_are_never_decayed_and_position_tables_are() -> None:
    model = _model()
    groups = {group.name: group for group in parameter_groups(model, OptimConfig(weight_decay=0.1), depth=4)}
    assert groups.keys() == {"decay", "no_decay"}
    assert (groups["decay"].weight_decay, groups["no_decay"].weight_decay) == (0.1, 0.0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(groups["decay"].parameter_names) == {name for name, shape in shapes.items() if len(shape) > 1}
    assert set(groups["no_decay"].parameter_names) == {name for name, shape in shapes.items() if len(shape) == 1}
    assert {"cls_token", "pos_embed", "blocks.0.attn.rel_pos_h"} <= set(groups["decay"].parameter_names)
    assert "blocks.0.attn.qkv.bias" in groups["no_decay"].parameter_names


def test_positions_can_be_left_undecayed_as_detectron2_does() -> None:
    groups = {g.name: g for g in parameter_groups(_model(), OptimConfig(decay_positions=False), depth=4)}
    spared = {"cls_token", "pos_embed", "blocks.0.attn.rel_pos_h", "blocks.3.attn.rel_pos_w"}
    assert spared <= set(groups["no_decay"].parameter_names)


def test_layer_decay_slows_layers_by_their_distance_from_the_output() -> None:
    model = _model()
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5), depth=4)
    scale = {name: group.lr_scale for group in groups for name in group.parameter_names}
    assert scale.keys() == dict(model.named_parameters()).keys()
    assert scale["head.projection.weight"] == scale["norm.bias"] == 1.0
    assert scale["blocks.3.mlp.fc1.weight"] == 0.5
    assert scale["blocks.0.norm1.weight"] == 0.5**4
    assert scale["patch_embed.proj.weight"] == scale["cls_token"] == scale["pos_embed"] == 0.5**5


@pytest.mark.parametrize("kind", get_args(DetectorKind))
def test_a_detectors_backbone_decays_by_depth_and_its_pyramid_and_heads_learn_at_the_full_rate(kind: Any) -> None:
    with torch.device("meta"):
        backbone = create_backbone(TINY, input_size=(32, 32), absolute_positions=True)
        detector = create_detector(backbone, kind, 3, DetectionConfig(pyramid_norm="layer"))
        classifier = create_model(TINY, num_classes=3, input_size=(32, 32), absolute_positions=True)
    config = OptimConfig(layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(detector, config, depth=4)
    scale = {name: group.lr_scale for group in groups for name in group.parameter_names}
    decay = {name: group.weight_decay for group in groups for name in group.parameter_names}
    assert scale.keys() == dict(detector.named_parameters()).keys()
    start = "pyramid.backbone."
    of_classifier = {n: g.lr_scale for g in parameter_groups(classifier, config, depth=4) for n in g.parameter_names}
    within = {name.removeprefix(start): value for name, value in scale.items() if name.startswith(start)}
    shared = within.keys() & of_classifier.keys()
    assert {0.5**power for power in range(1, 6)} == {within[name] for name in shared}
    assert {name: within[name] for name in shared} == {name: of_classifier[name] for name in shared}
    rest = {name: value for name, value in scale.items() if name.removeprefix(start) not in shared}
    assert {name.split(".")[0] for name in rest} == {"pyramid", "rpn", "box_heads", "mask_branch"}
    assert {f"{start}scale{stage}_norm.bias" for stage in (2, 3, 4, 5)} <= rest.keys()
    assert set(rest.values()) == {1.0}
    assert all((value > 0) == (detector.get_parameter(name).ndim > 1) for name, value in decay.items())
    assert len({group.name for group in groups}) == len(groups)


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, OptimConfig(), depth=0)
    assert group.parameter_names == ("bias",)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, OptimConfig(), depth=0)


def test_sgd_is_torchs_with_nesterov_momentum_and_counts_its_updates() -> None:
    config = OptimConfig(algorithm="sgd", momentum=0.8, weight_decay=0.1)
    results = []
    for which in ("ours", "ours from zero momentum", "torch's"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups = parameter_groups(model, config, depth=0)
        optimizer: torch.optim.Optimizer = build_optimizer(model, groups, config, fused=False)
        if which == "torch's":
            over = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
            optimizer = torch.optim.SGD(over, momentum=0.8, nesterov=True)
        if which == "ours from zero momentum":  # as the checkpoints create it
            for parameter in model.parameters():
                optimizer.state[parameter] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        if which != "torch's":
            assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_adamw_gets_the_groups_under_their_names() -> None:
    model = create_model(TINY, num_classes=3, input_size=(32, 32))
    config = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, parameter_groups(model, config, depth=4), config, fused=False)
    assert [(g["name"], g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        ("no_decay", 0.0, (0.8, 0.9), 1e-6),
        ("decay", 0.2, (0.8, 0.9), 1e-6),
    ]


@pytest.mark.parametrize(
    ("frozen", "starts"),
    [
        (1, ("patch_embed.", "cls_token", "pos_embed", "blocks.0.")),
        (3, ("patch_embed.", "cls_token", "pos_embed", "blocks.0.", "blocks.1.", "blocks.2.")),
        ("backbone", ("patch_embed.", "cls_token", "pos_embed", "blocks.", "norm.")),
    ],
)
def test_what_is_frozen_is_in_no_group_and_drops_no_path(frozen: Any, starts: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = create_model(
            TINY, num_classes=3, input_size=(32, 32), class_token=True, absolute_positions=True, drop_path=0.5
        )
    groups = parameter_groups(model, OptimConfig(freeze=frozen, layer_decay=0.5), depth=4)
    trained = {name for group in groups for name in group.parameter_names}
    names = dict(model.named_parameters()).keys()
    assert trained == {name for name in names if not name.startswith(starts)}
    rates = {name: module.rate for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert rates["blocks.3.drop_path"] == (0 if frozen == "backbone" else 0.5)
    assert all(rate == 0 for name, rate in rates.items() if name.startswith(starts))


def test_a_detector_s_frozen_backbone_leaves_the_pyramid_and_the_heads_to_train() -> None:
    with torch.device("meta"):
        backbone = create_backbone(TINY, hybrid_window=True)
        model = create_detector(backbone, "mask_rcnn", 2, DetectionConfig())
    groups = parameter_groups(model, OptimConfig(freeze="backbone"), depth=4)
    trained = {name for group in groups for name in group.parameter_names}
    assert trained
    assert not [name for name in trained if ".blocks." in name or ".patch_embed." in name]
    assert [name for name in trained if "fpn" in name or "rpn" in name]


@pytest.mark.parametrize("frozen", [5, 0, -1, "head"])
def test_more_blocks_than_there_are_cannot_be_frozen(frozen: Any) -> None:
    with pytest.raises(ValueError, match=r"freeze"):
        parameter_groups(_model(), OptimConfig(freeze=frozen), depth=4)
