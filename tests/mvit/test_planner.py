"""A plan compares every setting, says why it is not the choice, and refuses what it cannot plan."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import mvit
from mvit.checkpoint import predicted_bytes
from mvit.config import ConfigError, RunConfig
from mvit.planner import PUBLISHED_SAMPLES, Plan, foresee, micro_batch_sizes, num_samples, plan
from mvit.planner_memory import GIB
from tests.mvit.test_planner_memory import small_config

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "configs" / "imagenet1k" / "mvitv2_tiny.yaml"


def _config(**sections: Any) -> RunConfig:
    train = {"global_batch_size": 1024, "micro_batch_size": 16}
    return small_config(1, "bf16", **{"train": train, "data": {"train": "data/imagenet1k/train"}} | sections)


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(_config(), 16, 80)


def test_every_stage_checkpointing_and_micro_batch_is_compared(made: Plan) -> None:
    settings = {(one.zero_stage, one.checkpointing, one.micro_batch_size) for one in made.candidates}
    assert len(settings) == len(made.candidates) == 4 * 5 * 7
    assert {one.micro_batch_size for one in made.candidates} == {1, 2, 4, 8, 16, 32, 64}
    for one in made.candidates:
        assert one.micro_batch_size * one.accumulation_steps * 16 == 1024


def test_the_choice_is_the_fastest_that_fits_and_every_other_says_why_it_is_not(made: Plan) -> None:
    assert made.chosen is not None
    assert made.chosen == made.candidates[0]
    assert made.chosen.verdict == "chosen: the fastest that fits"
    fits = [one for one in made.candidates if one.fits]
    assert made.chosen.step.total == min(one.step.total for one in fits)
    for one in made.candidates[1:]:
        assert any(word in one.verdict for word in ("slower", "needs more memory", "the same", "does not fit"))
    slower = next(one for one in made.candidates if "slower" in one.verdict)
    percent = float(slower.verdict.split("%")[0])
    assert percent == pytest.approx(100 * (slower.step.total / made.chosen.step.total - 1), abs=0.05)


def test_what_does_not_fit_is_never_chosen_and_says_what_it_needs(made: Plan) -> None:
    needed = sorted(one.memory.needed for one in made.candidates)
    tight = plan(_config(), 16, needed[len(needed) // 2] / GIB)
    assert tight.chosen is not None
    assert tight.chosen.memory.needed <= needed[len(needed) // 2]
    for one in tight.candidates:
        assert one.fits == (one.memory.needed <= tight.gpu_memory_gib * GIB)
        assert one.fits != one.verdict.startswith("does not fit: needs ")


def test_the_recipe_s_own_setting_is_marked_and_foreseen_alike_without_the_others(made: Plan) -> None:
    own = made.recipe_setting
    assert own is not None
    assert (own.zero_stage, own.checkpointing, own.micro_batch_size) == (1, (), 16)
    assert [one.is_recipe for one in made.candidates].count(True) == 1
    alone = foresee(_config(), 16)
    assert (alone.memory, alone.step) == (own.memory, own.step)


def test_the_overrides_of_a_setting_are_a_recipe_s(made: Plan) -> None:
    kinds = {(one.zero_stage, one.checkpointing): one for one in made.candidates}
    assert len(kinds) == 20
    for one in kinds.values():
        config = mvit.load_config(TINY, ["train.global_batch_size=1024", "image.mix_prob=0", *one.overrides])
        assert config.zero.stage == one.zero_stage
        assert config.train.checkpointed_stages == one.checkpointing
        assert config.batch_arithmetic(16).accumulation_steps == one.accumulation_steps


def test_a_run_s_hours_are_its_steps_and_published_sets_need_no_data(made: Plan) -> None:
    assert made.samples == PUBLISHED_SAMPLES["imagenet1k"]
    assert made.total_steps == _config().total_steps(1_281_167)
    assert made.chosen is not None
    assert made.total_steps is not None
    assert made.hours(made.chosen) == pytest.approx(made.chosen.step.total * made.total_steps / 3600)
    row = made.as_dict()["chosen"]
    assert row["gpu_hours"] == pytest.approx(16 * row["hours"])
    assert 0 < row["mfu"] < 1


def test_the_size_of_an_unknown_training_set_is_asked_for_or_given() -> None:
    unknown = plan(_config(data={"train": "data/mine"}), 16, 80)
    assert (unknown.total_steps, unknown.samples) == (None, None)
    assert "--samples" in unknown.samples_from
    assert unknown.as_dict()["chosen"]["hours"] is None
    assert num_samples(_config(data={"train": "data/mine"}), 102_400) == (102_400, "as given")


def test_a_checkpoint_s_size_is_the_one_that_a_run_reserves(made: Plan) -> None:
    assert made.checkpoint_bytes == predicted_bytes(made.num_parameters, ema=False, num_moments=2)


def test_a_plan_is_json(made: Plan) -> None:
    told = json.loads(json.dumps(made.as_dict()))
    assert len(told["candidates"]) == len(made.candidates)
    assert {"peak_bytes", "needed_bytes", "step_seconds", "hours", "verdict", "overrides"} <= told["chosen"].keys()
    assert told["recipe_setting"]["is_recipe"] is True


def test_a_plan_scales_to_a_thousand_gpus() -> None:
    """At the same micro-batch more GPUs need no more memory, never do more work each, and talk no less."""
    config = _config(train={"global_batch_size": 16384, "micro_batch_size": 16})
    found = [foresee(config, gpus) for gpus in (8, 64, 1024)]
    assert [one.accumulation_steps for one in found] == [128, 16, 1]
    assert [one.memory.optimizer for one in found] == sorted((one.memory.optimizer for one in found), reverse=True)
    assert found[0].step.total > found[1].step.total > found[2].step.total
    efficiency = [one.step.total * gpus for one, gpus in zip(found, (8, 64, 1024), strict=True)]
    assert efficiency == sorted(efficiency)
    assert found[0].step.network_bytes == 0
    assert found[2].step.network_bytes > 0


def test_a_recipe_that_cannot_run_on_so_many_gpus_is_told_in_a_note() -> None:
    odd = plan(_config(train={"global_batch_size": 12, "micro_batch_size": 4}), 6, 80, samples=100)
    assert odd.recipe_setting is None
    assert "train.micro_batch_size = 4 does not divide 12 samples over 6 GPUs" in " ".join(odd.notes)
    with pytest.raises(ConfigError, match="not micro_batch_size x ranks x a whole number"):
        foresee(_config(train={"global_batch_size": 12, "micro_batch_size": 4}), 6)


@pytest.mark.parametrize(
    ("gpus", "gib", "gpu", "per_node", "told"),
    [
        (16, 80, "h1000", 8, "--gpu h1000: unknown; choose from v100, a100"),
        (0, 80, "h100", 8, "--gpus 0 must be more than 0"),
        (16, -1, "h100", 8, "--gpu-memory-gib -1 must be more than 0"),
        (16, math.nan, "h100", 8, "--gpu-memory-gib nan must be more than 0"),
        (16, 80, "h100", 0, "--gpus-per-node 0 must be more than 0"),
        (16, 16, "v100", 8, "train.precision = bf16: a v100 has no bf16 matrix units; set train.precision=fp16"),
        (24, 80, "h100", 8, "1024 / 24 = 42.67; choose --gpus one of 8, 16, 32, 64"),
        (4096, 80, "h100", 8, "cannot be divided among 4096 GPUs"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_way_out(
    gpus: int, gib: float, gpu: str, per_node: int, told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan(_config(), gpus, gib, gpu, gpus_per_node=per_node)
    assert told in str(error.value)


def test_a_detector_is_refused_with_where_its_figures_are() -> None:
    recipe = ROOT / "configs" / "coco" / "mask_rcnn_mvitv2_tiny_3x.yaml"
    with pytest.raises(ConfigError, match=r"task = detection: .*docs/detection\.md"):
        plan(mvit.load_config(recipe), 8, 80)


def test_micro_batches_make_up_the_batch_and_are_large_enough_to_mix() -> None:
    mixing = _config(image={"mix_prob": 1.0}, train={"global_batch_size": 96, "micro_batch_size": 2})
    assert micro_batch_sizes(mixing, 8) == [2, 3, 4, 6, 12]


def test_fp16_has_no_stage_0() -> None:
    fp16 = small_config(1, "fp16", train={"global_batch_size": 4, "micro_batch_size": 4})
    assert {one.zero_stage for one in plan(fp16, 1, 80, samples=1000).candidates} == {1, 2, 3}
