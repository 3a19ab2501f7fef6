"""Every shipped recipe loads, builds its model on the meta device, says where it comes from, and fits 64 GPUs."""

import re
from pathlib import Path

import pytest
import torch

import mvit
from launcher.cluster import load_cluster
from mvit.tasks import create_task

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "cluster")
CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))


def _label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_are_recipes_and_clusters() -> None:
    assert len(RECIPES) >= 6
    assert {"local", "slurm_8x8"} <= {path.stem for path in CLUSTERS}


@pytest.mark.parametrize("path", RECIPES, ids=_label)
def test_a_recipe_builds_its_model_and_survives_its_own_resolved_form(path: Path, tmp_path: Path) -> None:
    config = mvit.load_config(path)
    with torch.device("meta"):
        model = create_task(config).build_model()
    assert model.num_classes == config.model.num_classes
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert mvit.load_config(saved) == config
    assert config.total_steps(1_281_167) > config.warmup_steps(1_281_167)


@pytest.mark.parametrize("path", RECIPES, ids=_label)
def test_a_recipe_s_header_states_row_command_hardware_and_result(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    for word in ("Paper row:", "Command:", "Hardware:", "Expected:"):
        assert word in header.group(), f"{path} says nothing about {word}"
    assert str(path.relative_to(ROOT)) in header.group(), "the command names another recipe"


@pytest.mark.parametrize("path", [p for p in RECIPES if "imagenet1k" in str(p)], ids=_label)
def test_published_recipes_divide_over_the_published_64_gpus(path: Path) -> None:
    arithmetic = mvit.load_config(path).batch_arithmetic(64)
    assert (arithmetic.global_batch_size, arithmetic.accumulation_steps) == (2048, 1)


@pytest.mark.parametrize(
    ("name", "gpus", "parameters", "views"),
    [
        ("kinetics400/mvitv2_small_16x4", 128, 34_537_744, 5),
        ("kinetics400/mvitv2_base_32x3", 128, 51_230_128, 5),
        ("kinetics400/mvitv2_large_40x3", 64, 213_390_112, 15),
        ("kinetics400/mvitv2_large_16x4", 128, None, 5),
        ("kinetics400/mvitv2_small_16x4_in1k", 128, 34_537_744, 5),
        ("kinetics400/mvitv2_small_16x4_in21k", 128, 34_537_744, 5),
        ("kinetics400/mvitv2_base_32x3_in1k", 128, 51_230_128, 5),
        ("kinetics400/mvitv2_base_32x3_in21k", 128, 51_230_128, 5),
        ("kinetics600/mvitv2_base_32x3", 128, None, 5),
        ("kinetics600/mvitv2_large_40x3", 64, None, 12),
        ("kinetics700/mvitv2_base_32x3", 128, None, 9),
        ("kinetics700/mvitv2_large_40x3", 64, None, 9),
        ("ssv2/mvitv2_small_16x4", 64, 34_363_950, 3),
        ("ssv2/mvitv2_base_32x3", 64, 51_056_334, 3),
        ("ssv2/mvitv2_large_40x3", 64, 213_129_534, 3),
    ],
)
def test_video_recipes_have_the_published_models_views_and_batches(
    name: str, gpus: int, parameters: int | None, views: int
) -> None:
    config = mvit.load_config(ROOT / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        model = create_task(config).build_model()
    count = sum(p.numel() for p in model.parameters())
    assert parameters in (None, count)
    assert config.video.views == views
    assert config.batch_arithmetic(64).global_batch_size == config.batch_arithmetic(gpus).global_batch_size
    assert config.batch_arithmetic(gpus).accumulation_steps == (4 if "ssv2/mvitv2_large" in name else 1)
    assert config.train.micro_batch_size % config.repeats == 0
    if "kinetics" in name and "40x3" not in name:  # B.4: at 512 clips, from and to 16 nodes' 1e-6
        lr = 4.8e-4 if "in1k" in name else 1.6e-4 if "in21k" in name or "large" in name else 1.6e-3
        assert config.scaled_lr(config.optim.lr) == pytest.approx(lr)
        assert config.scaled_lr(config.schedule.end_lr) == pytest.approx(1.6e-5)


@pytest.mark.parametrize("path", CLUSTERS, ids=_label)
def test_a_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).executor in ("local", "slurm")
