"""A weights file's passport: whose, of what model, what loads and what is resized, and whether it answers alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torchvision.models.video import mvit_v2_s

from launcher.cli import main
from mvit.export import export_weights
from mvit.model.convert import import_names
from mvit.variants import VARIANTS, Variant, create_backbone, create_model
from mvit.weight_facts import weight_facts
from mvit.weight_passport import inspect_weights
from tests.mvit.synthetic_checkpoint import untrained

SMALL = Variant("mine", embed_dim=16, depths=(1, 2, 1, 1), num_heads=2)


def _file(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": True, "num_classes": 21},
        {"expand": "mlp", "input_size": (384, 384)},
        {"input_size": (96, 64)},
    ],
    ids=str,
)
def test_the_facts_are_those_of_the_model(variant: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = create_model(variant, **options)
    facts = weight_facts(model.state_dict())
    assert facts.published
    assert facts.variant.name == variant
    assert facts.expand == model.expand
    assert facts.input_size == model.input_size
    assert facts.num_classes == model.num_classes
    assert facts.class_token == bool(model.class_tokens)
    assert (facts.relative_positions, facts.absolute_positions, facts.clips) == (True, False, False)


@pytest.mark.parametrize("size", [(16, 224, 224), (40, 312, 312)])
def test_clips_tell_their_frames(size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        facts = weight_facts(create_model("mvitv2_small", 400, size).state_dict())
    assert (facts.input_size, facts.clips, facts.class_token) == (size, True, True)


def test_sizes_of_one_s_own_and_absolute_positions_are_told(tmp_path: Path) -> None:
    options: Any = {"relative_positions": False, "absolute_positions": True, "qkv_bias": False}
    model = create_model(replace(SMALL, mlp_ratio=2.0), 5, (64, 64), **options)
    facts = weight_facts(model.state_dict())
    sizes = facts.variant
    assert (sizes.embed_dim, sizes.depths, sizes.num_heads, sizes.mlp_ratio) == (16, (1, 2, 1, 1), 2, 2.0)
    assert (facts.published, facts.input_size, facts.qkv_bias) == (False, (64, 64), False)
    passport = inspect_weights(_file(tmp_path, model.state_dict()))
    assert passport.report is not None
    assert not passport.report.resized


def test_weights_of_timm_give_timm_s_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=16, num_heads=2)
    theirs = MultiScaleVit(sizes, img_size=(64, 64), num_classes=5)
    passport = inspect_weights(_file(tmp_path, theirs.state_dict()), reference=True)
    assert (passport.naming, passport.reference) == ("timm", "timm's MultiScaleVit")
    assert passport.difference is not None
    assert passport.largest is not None
    assert passport.difference <= 2e-5 * max(1, passport.largest)
    text = str(passport)
    assert "model:      own sizes (embed 16, blocks 1-2-1-1, heads 2), images" in text
    assert "max |Δlogit| to timm's MultiScaleVit" in text


def test_an_official_checkpoint_is_told_with_all_that_lies_beside_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(SMALL, 5, (64, 64))
    content = {"model_state": model.state_dict(), "epoch": 300, "optimizer_state": {"lr": 0.1}}
    passport = inspect_weights(_file(tmp_path, content, "run.pyth"), reference=True)
    assert (passport.naming, passport.beside) == ("official", ("epoch", "optimizer_state"))
    assert passport.difference is not None
    assert passport.difference <= 1e-5


@pytest.mark.timeout(120)
def test_torchvision_s_clips_are_compared_with_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    passport = inspect_weights(_file(tmp_path, mvit_v2_s(num_classes=4).state_dict()), reference=True)
    assert (passport.naming, passport.facts.variant.name) == ("torchvision", "mvitv2_small")
    assert passport.reference == "torchvision's mvit_v2_s"
    assert passport.difference is not None
    assert passport.difference <= 1e-4


def test_a_class_token_has_no_reference_for_a_reason(tmp_path: Path) -> None:
    passport = inspect_weights(_file(tmp_path, create_model(SMALL, 5, (64, 64), True).state_dict()), reference=True)
    assert passport.difference is None
    assert "timm adds the pooled query to the class token" in str(passport)


def test_an_export_of_ours_names_its_run_and_a_recipe_shows_what_is_resized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = untrained(tmp_path, "small_run")
    file = export_weights(config.run_dir, tmp_path / "w.safetensors", verify=False)
    assert inspect_weights(file).run == {"run": "small_run", "step": "1", "averaged": "false"}
    larger = config.model_copy(update={"image": config.image.model_copy(update={"image_size": (64, 64)})})
    recipe = tmp_path / "larger.yaml"
    recipe.write_text(larger.to_yaml())
    words = ["weights", "inspect", str(file), "--recipe", str(recipe)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "small_run"
    assert found["input_size"] == [32, 32]
    assert found["report"]["resized"][0][0] == "blocks.0.attn.rel_pos_h"
    assert main([*words, "model.num_classes=3"]) == 1
    assert "The head is for 10 classes, the model for 3" in capsys.readouterr().out
    assert main([*words, "model.num_classes=3", "model.new_head=true"]) == 0
    assert "start anew: head.projection.weight" in capsys.readouterr().out


def test_backbones_and_their_detectors_are_told_apart_from_classifiers(tmp_path: Path) -> None:
    backbone = create_backbone(SMALL, hybrid_window=True)
    passport = inspect_weights(_file(tmp_path, backbone.state_dict()))
    assert passport.facts.num_classes is None
    assert passport.report is not None
    assert passport.target == "a backbone of own sizes"
    assert not passport.report.missing
    assert passport.parts == {f"scale{scale}_norm": 2 for scale in (2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(2)}, "not MViTv2 weights in a naming known here"),
        ({"blocks.0.norm1.weight": torch.zeros(2)}, "patch_embed.proj.weight is missing"),
    ],
)
def test_what_is_no_mvitv2_is_refused(
    tmp_path: Path, content: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "inspect", str(_file(tmp_path, content))]) == 1
    assert words in capsys.readouterr().err


def test_names_are_those_of_import_names() -> None:
    model = create_model(SMALL, 5, (64, 64))
    naming, state = import_names(model.state_dict())
    assert naming == "official"
    assert weight_facts(state).variant.depths == SMALL.depths
