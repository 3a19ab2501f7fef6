"""Every shipped recipe loads, builds its model on the meta device, says where it comes from, and fits 64 GPUs."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

import mvit
from launcher.cluster import load_cluster
from mvit.config import RunConfig
from mvit.schedule import learning_rate
from mvit.starting_weights import check_start
from mvit.tasks import create_task
from mvit.variants import create_backbone

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in ("cluster", "published"))
CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))


def _label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@cache
def _all_recipes() -> list[RunConfig]:
    return [mvit.load_config(path) for path in RECIPES]


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


@pytest.mark.parametrize("path", RECIPES, ids=_label)
def test_a_recipe_stands_on_one_other_at_most(path: Path) -> None:
    base = re.search(r"^base: (.*)$", path.read_text(), re.MULTILINE)
    if base is not None:
        assert not re.search(r"^base:", (path.parent / base.group(1)).read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [p for p in RECIPES if "\n  weights: runs/" in p.read_text()], ids=_label)
def test_a_recipe_that_starts_from_a_run_names_a_recipe_whose_weights_it_can_take(path: Path) -> None:
    config = mvit.load_config(path)
    before = [one for one in _all_recipes() if str(one.run_dir) == config.model.weights]
    assert len(before) == 1, config.model.weights
    check_start(before[0], config)


# recipe: global batch, accumulation on 64 GPUs, peak rate, exact parameters
IMAGES: dict[str, tuple[int, int, float, int]] = {
    "imagenet1k/mvitv2_tiny": (2048, 1, 2e-3, 24_173_320),
    "imagenet1k/mvitv2_small": (2048, 1, 2e-3, 34_870_216),
    "imagenet1k/mvitv2_base": (2048, 1, 2e-3, 51_472_744),
    "imagenet1k/mvitv2_large": (2048, 1, 2e-3, 217_992_952),
    "imagenet1k/mvitv2_huge": (2048, 1, 2e-3, 666_879_720),
    "imagenet1k/mvitv2_tiny_384": (512, 1, 8e-5, 0),
    "imagenet1k/mvitv2_small_384": (512, 1, 8e-5, 0),
    "imagenet1k/mvitv2_base_384": (512, 1, 8e-5, 0),
    "imagenet1k/mvitv2_large_384": (512, 1, 4e-4, 0),
    "imagenet21k/mvitv2_small": (2048, 1, 5.4e-4, 48_840_000),
    "imagenet21k/mvitv2_base": (2048, 1, 5.4e-4, 65_440_000),
    "imagenet21k/mvitv2_large": (2048, 1, 8e-4, 234_580_000),
    "imagenet21k/mvitv2_huge": (2048, 1, 8e-4, 694_800_000),
    "imagenet21k/mvitv2_large_in1k_224": (512, 1, 5.6e-4, 213_635_368 + 144),  # and the class token
    "imagenet21k/mvitv2_large_in1k_384": (512, 1, 5.6e-4, 0),
    "imagenet21k/mvitv2_huge_in1k_224": (512, 1, 5.6e-4, 666_879_720 + 192),
    "imagenet21k/mvitv2_huge_in1k_384": (512, 2, 5.6e-4, 0),
    "imagenet21k/mvitv2_huge_in1k_512": (512, 4, 5.6e-4, 0),
}


def test_every_image_recipe_is_known_here() -> None:
    assert {f"{p.parent.name}/{p.stem}" for p in RECIPES if p.parent.name.startswith("imagenet")} == IMAGES.keys()


@pytest.mark.parametrize("name", IMAGES)
def test_image_recipes_have_the_published_batch_rate_and_parameters_on_64_gpus(name: str) -> None:
    batch, accumulation, peak, parameters = IMAGES[name]
    config = mvit.load_config(ROOT / "configs" / f"{name}.yaml")
    arithmetic = config.batch_arithmetic(64)
    assert (arithmetic.global_batch_size, arithmetic.accumulation_steps) == (batch, accumulation)
    assert config.scaled_lr(config.optim.lr) == pytest.approx(peak)
    assert (config.image.evaluated_classes == 1000) == (config.model.num_classes == 19168)
    if parameters:  # at other sizes than 224 the position tables have other sizes, too
        with torch.device("meta"):
            count = sum(p.numel() for p in create_task(config).build_model().parameters())
        assert count == parameters or (parameters % 10_000 == 0 and abs(count - parameters) <= 5_000)


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
        ("kinetics400/mvitv2_large_16x4_scratch", 128, None, 5),
        ("kinetics400/mvitv2_large_16x4_in1k", 128, None, 5),
        ("kinetics400/mvitv2_large_40x3_224_scratch", 64, None, 5),
        ("kinetics400/mvitv2_large_40x3_224_in1k", 64, None, 5),
        ("kinetics400/mvitv2_large_40x3_224_in21k", 64, None, 5),
        ("kinetics400/mvitv2_large_40x3_312_scratch", 64, 213_390_112, 5),
        ("kinetics400/mvitv2_large_40x3_312_in1k", 64, 217_747_696, 5),
        ("kinetics400/mvitv2_large_40x3_312_in21k", 64, 213_390_112, 5),
        ("kinetics600/mvitv2_base_32x3", 128, None, 5),
        ("kinetics600/mvitv2_large_16x4", 128, None, 5),
        ("kinetics600/mvitv2_large_32x3", 64, None, 12),
        ("kinetics600/mvitv2_large_40x3", 64, None, 12),
        ("kinetics600/mvitv2_large_40x3_352", 64, None, 12),
        ("kinetics700/mvitv2_base_32x3", 128, None, 9),
        ("kinetics700/mvitv2_large_16x4", 128, None, 5),
        ("kinetics700/mvitv2_large_40x3", 64, None, 9),
        ("ssv2/mvitv2_small_16x4", 64, 34_363_950, 3),
        ("ssv2/mvitv2_base_32x3", 64, 51_056_334, 3),
        ("ssv2/mvitv2_base_32x3_in21k", 64, 51_056_334, 3),
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
    if (
        "kinetics" in name and "40x3" not in name and "large_32x3" not in name
    ):  # B.4: at 512 clips, from and to 16 nodes' 1e-6
        from_21k = "in21k" in name or name.endswith("mvitv2_large_16x4")
        lr = 4.8e-4 if "in1k" in name else 1.6e-4 if from_21k else 1.6e-3
        assert config.scaled_lr(config.optim.lr) == pytest.approx(lr)
        assert config.scaled_lr(config.schedule.end_lr) == pytest.approx(1.6e-5)


# recipe: published millions of parameters (None: of another network), peak rate at 64 pictures, steps and falls
STEPS_3X = (67_500, 52_500, 62_500)
STEPS_50, STEPS_100 = (92_187, 81_944, 88_773), (184_375, 163_889, 177_546)
COCO: dict[str, tuple[int | None, float, tuple[int, int, int]]] = {
    "mask_rcnn_mvitv2_tiny_3x": (44, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_small_3x": (54, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_base_3x": (71, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_large_3x": (238, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_small_in21k_3x": (54, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_base_in21k_3x": (71, 1.6e-4, STEPS_3X),
    "mask_rcnn_mvitv2_large_in21k_3x": (None, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_tiny_3x": (76, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_small_3x": (87, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_base_3x": (103, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_large_3x": (270, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_base_in21k_3x": (103, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_large_in21k_lsj_50ep": (None, 1.0e-4, STEPS_50),
    "cascade_mask_rcnn_mvitv2_huge_in21k_lsj_3x": (718, 1.6e-4, STEPS_3X),
    "cascade_mask_rcnn_mvitv2_base_in21k_lsj_100ep": (103, 8.0e-5, STEPS_100),
    "cascade_mask_rcnn_mvitv2_large_in21k_lsj_50ep_layernorm": (None, 8.0e-5, STEPS_50),
    "cascade_mask_rcnn_mvitv2_huge_in21k_lsj_3x_layernorm": (718, 1.6e-4, STEPS_3X),
}
COCO_WITH_OBJECTS = 117_266  # of 118,287 pictures of train2017


def _coco(name: str) -> RunConfig:
    return mvit.load_config(ROOT / "configs" / "coco" / f"{name}.yaml")


def test_every_coco_recipe_is_known_here() -> None:
    assert {path.stem for path in RECIPES if path.parent.name == "coco"} == COCO.keys()


@pytest.mark.parametrize("name", COCO)
def test_coco_recipes_have_the_published_detector_and_batch(name: str) -> None:
    published, _, _ = COCO[name]
    config = _coco(name)
    with torch.device("meta"):
        model = create_task(config).build_model()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert published in (None, round(count)), f"{count:.2f} M"
    if published is None:  # the L of ImageNet-21K grows its channels in the attention, the one that was counted did not
        assert config.model.expand == "attention"
        assert round(count) in (233, 265)
    arithmetic = config.batch_arithmetic(64)
    assert (arithmetic.global_batch_size, arithmetic.accumulation_steps) == (64, 1)
    assert config.detector.kind == ("cascade_mask_rcnn" if name.startswith("cascade") else "mask_rcnn")
    assert config.detection.policy == ("large_scale_jitter" if "lsj" in name else "multi_scale")
    assert config.name == f"coco_{name}"
    assert (config.optim.weight_decay, config.optim.clip_grad_norm) == (0.1, 0.0)


@pytest.mark.parametrize("name", COCO)
def test_the_rate_of_coco_recipes_rises_and_falls_where_published(name: str) -> None:
    _, peak, (steps, *falls) = COCO[name]
    config = _coco(name)
    assert config.total_steps(COCO_WITH_OBJECTS) == steps
    assert config.schedule.shape == "steps"

    def rate(step: int) -> float:
        return learning_rate(
            step,
            total_steps=steps,
            warmup_steps=config.warmup_steps(COCO_WITH_OBJECTS),
            peak=config.scaled_lr(config.optim.lr),
            start=config.scaled_lr(config.schedule.warmup_lr),
            end=0.0,
            milestones=config.schedule.milestones,
        )

    first, second = falls
    assert rate(1) == pytest.approx(peak / 1000)
    assert rate(126) == pytest.approx((peak / 1000 + peak) / 2)
    assert [rate(251), rate(first)] == pytest.approx([peak] * 2)
    assert [rate(first + 1), rate(second)] == pytest.approx([peak / 10] * 2)
    assert [rate(second + 1), rate(steps)] == pytest.approx([peak / 100] * 2)


@pytest.mark.parametrize("name", [name for name in COCO if "in21k" not in name])
def test_coco_recipes_start_from_an_image_recipe_that_their_backbone_can_take(name: str) -> None:
    config = _coco(name)
    assert config.model.weights is not None
    folder, image_recipe = config.model.weights.rsplit("_mvitv2", 1)[0], config.model.weights.rsplit("_", 1)[1]
    image = mvit.load_config(ROOT / "configs" / folder.removeprefix("runs/") / f"mvitv2_{image_recipe}.yaml")
    assert config.model.weights == str(image.run_dir)
    with torch.device("meta"):
        theirs = create_task(image).build_model()
        ours = create_backbone(config.model.variant, expand=config.model.expand or "attention")
    given = {n: p.shape for n, p in theirs.named_parameters() if not n.startswith(("head.", "norm."))}
    wanted = {n: p.shape for n, p in ours.named_parameters() if not n.startswith("scale")}
    assert given.keys() == wanted.keys()
    assert [n for n in wanted if given[n] != wanted[n] and "rel_pos" not in n] == []  # tables are resized


@pytest.mark.parametrize("path", CLUSTERS, ids=_label)
def test_a_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).executor in ("local", "slurm")
