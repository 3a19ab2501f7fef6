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


@pytest.mark.parametrize("path", CLUSTERS, ids=_label)
def test_a_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).executor in ("local", "slurm")
