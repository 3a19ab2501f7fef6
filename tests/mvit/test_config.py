"""Config errors name the key, the value, the rule and the way out; derived values are the published ones."""

from pathlib import Path

import pytest

import mvit
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.run_identity import differences
from mvit.schedule import learning_rate
from mvit.zero import ZeroConfig, deepspeed_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "imagenet1k" / "mvitv2_tiny.yaml"


@pytest.mark.parametrize("key", ["activation_checkpointing", "compile"])
def test_off_may_be_typed_although_yaml_takes_it_for_false(key: str) -> None:
    assert getattr(mvit.load_config(TINY, [f"train.{key}=off"]).train, key) == "off"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"optim\.lrr = 1: unknown key; did you mean 'lr'\? \(keys of optim: lr, lr_batch_size,"),
        (["optm.lr=1"], r"optm = .*unknown key; did you mean 'optim'"),
        (["model.variant=mvitv2_tin"], r"model\.variant = 'mvitv2_tin': unknown variant; did you mean 'mvitv2_tiny'\?"),
        (["optim.lr=fast"], r"optim\.lr = 'fast': input should be a valid number"),
        (["optim.lr=-1"], r"optim\.lr = -1: input should be greater than 0"),
        (["zero.stage=4"], r"zero\.stage = 4: input should be 0, 1, 2 or 3"),
        (["zero.stage=0", "zero.offload_optimizer=true"], r"zero: offload_optimizer = true needs sharded optimizer"),
        (["zero.offload_parameters=true"], r"offload_parameters = true needs zero\.stage=3, stage is 1"),
        (["train.precision=fp16", "zero.stage=0"], r"fp16 needs zero\.stage 1, 2 or 3"),
        (["train.micro_batch_size=33"], r"global_batch_size = 2048 is not a multiple of .*micro_batch_size = 33"),
        (["train.activation_checkpointing=[stage5]"], r"activation_checkpointing.* = 'stage5'.*'stage1', 'stage2'"),
        (["schedule.warmup_epochs=301"], r"schedule: warmup_epochs = 301.* is longer than the training"),
        (["train.micro_batch_size=1"], r"train\.micro_batch_size = 1: with mixup or cutmix on.*image\.mix_prob=0"),
        (["video.num_frames=8"], r"video\.num_frames = 8 would have no effect: .*set task=video_classification, or"),
        (["task=video_classification", "image.decoder=pil"], r"image\.decoder = 'pil' would have no effect"),
        (
            ["task=video_classification", "video.repeats=2", "train.micro_batch_size=2"],
            r"micro_batch_size = 2: .*needs at least 3 clips, of two videos.*video\.mix_prob=0",
        ),
        (["name=a/b"], r"name = 'a/b': .*must not contain slashes"),
        (["optim.lr"], r"override 'optim\.lr' has no `=`"),
    ],
)
def test_a_wrong_key_or_value_is_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mvit.load_config(TINY, overrides)


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)optim\.a = 1.*zero\.b = 2"):
        mvit.load_config(TINY, ["optim.a=1", "zero.b=2"])


def test_a_recipe_that_is_not_there_or_leads_back_to_itself_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe; did you mean 'mvitv2_tiny\.yaml'"):
        mvit.load_config(TINY.with_name("mvitv2_tinny.yaml"))
    (tmp_path / "a.yaml").write_text("base: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        mvit.load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        mvit.load_config(tmp_path / "c.yaml")


def test_overrides_come_last_and_bases_first() -> None:
    config = mvit.load_config(TINY.with_name("mvitv2_large.yaml"), ["optim.lr=1e-4", "schedule.epochs=90"])
    assert (config.optim.lr, config.schedule.epochs, config.optim.weight_decay) == (1e-4, 90, 0.1)
    assert config.model.variant == "mvitv2_large"


def test_a_batch_that_does_not_divide_shows_the_arithmetic_and_the_ways_out() -> None:
    config = mvit.load_config(TINY)
    assert str(config.batch_arithmetic(16)) == (
        "32 samples/micro-batch x 4 accumulation steps x 16 ranks = 2048 samples/step"
    )
    with pytest.raises(ConfigError, match=r"32 x 24 = 768, 2048 / 768 = 2\.667.*global_batch_size=1536 or 2304"):
        config.batch_arithmetic(24)


def test_the_learning_rate_is_the_published_one() -> None:
    """IMG lr_policy: 300 epochs of 625 steps, 70 of linear warm-up, then a cosine to the end rate, scaled by 8."""
    config = mvit.load_config(TINY)
    peak, start, end = (config.scaled_lr(lr) for lr in (config.optim.lr, 1e-8, 1e-6))
    assert (peak, start, end) == pytest.approx((2e-3, 8e-8, 8e-6))
    assert config.total_steps(1_281_167) == 187_670
    assert config.warmup_steps(1_281_167) == 43_789

    def at(step: int) -> float:
        return learning_rate(step, total_steps=300 * 625, warmup_steps=70 * 625, peak=peak, start=start, end=end)

    assert at(1) == pytest.approx(8e-8)
    assert at(35 * 625 + 1) == pytest.approx((2e-3 + 8e-8) / 2)
    assert at(70 * 625 + 1) == pytest.approx(2e-3)
    assert at(185 * 625 + 1) == pytest.approx((2e-3 + 8e-6) / 2)
    assert at(300 * 625) == pytest.approx(8e-6, rel=1e-3)
    assert all(at(s) < at(s + 1) for s in range(1, 70 * 625, 1000))
    assert all(at(s) > at(s + 1) for s in range(70 * 625 + 1, 300 * 625 - 1, 1000))


def test_with_repeats_an_epoch_has_more_clips_and_so_more_steps() -> None:
    tree = {"name": "clips", "task": "video_classification", "model": {"num_classes": 400}}
    tree |= {"train": {"global_batch_size": 512}, "schedule": {"epochs": 200, "warmup_epochs": 30}}
    plain, doubled = parse_config(tree), parse_config(tree | {"video": {"repeats": 2}})
    videos = 240_436  # Kinetics-400
    assert doubled.epoch_size(videos) == 2 * videos
    assert plain.total_steps(videos) == 200 * videos // 512
    assert doubled.total_steps(videos) == 200 * videos // 256
    assert doubled.warmup_steps(videos) == 30 * videos // 256
    with pytest.raises(ConfigError, match="over 1 samples x 2 repeats is less than one step"):
        doubled.total_steps(1)


def test_a_task_s_config_tells_its_inputs_and_keeps_silent_about_the_other_s() -> None:
    image, video = parse_config({"name": "a"}), parse_config({"name": "a", "task": "video_classification"})
    assert (image.input_size, video.input_size) == ((224, 224), (16, 224, 224))
    assert "video" not in image.model_dump()
    assert "image" not in video.model_dump()
    for config in (image, video):
        assert parse_config(config.model_dump(mode="json")) == config


def test_what_may_change_between_attempts_is_told_from_what_may_not() -> None:
    saved = mvit.load_config(TINY)
    assert (
        differences(saved, mvit.load_config(TINY, ["zero.stage=3", "train.save_every=7", "data.num_workers=1"])) == []
    )
    assert differences(saved, mvit.load_config(TINY, ["train.micro_batch_size=16"])) == []
    assert differences(saved, mvit.load_config(TINY, ["optim.betas=[0.9,0.95]", "seed=1"])) == [
        "optim.betas: [0.9, 0.999] -> [0.9, 0.95]",
        "seed: 0 -> 1",
    ]


def test_deepspeed_gets_the_stage_the_precision_and_the_clipping() -> None:
    arguments = {"micro_batch_size": 4, "accumulation_steps": 2, "clip_grad_norm": 1.0, "world_size": 8}
    for stage in (1, 2, 3):
        config = deepspeed_config(ZeroConfig(stage=stage), precision="bf16", **arguments)
        assert config["zero_optimization"]["stage"] == stage
        assert config["bf16"] == {"enabled": True}
        assert config["gradient_clipping"] == 1.0
        assert config["train_batch_size"] == 64
        assert ("stage3_param_persistence_threshold" in config["zero_optimization"]) == (stage == 3)
    fp16 = deepspeed_config(ZeroConfig(stage=2), precision="fp16", **arguments)
    assert fp16["fp16"]["loss_scale"] == 0, "the loss scale must be dynamic"
    plain = deepspeed_config(ZeroConfig(stage=0), precision="bf16", **arguments)
    assert plain["torch_autocast"]["enabled"]
    assert "bf16" not in plain
    assert plain["gradient_clipping"] == 0, "stage 0 is clipped by our engine, once"
    offloaded = deepspeed_config(
        ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True), precision="fp32", **arguments
    )
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert offloaded["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_the_resolved_config_is_a_valid_recipe(tmp_path: Path) -> None:
    config = parse_config({"name": "x", "model": {"depths": [1, 1, 1, 1]}})
    assert isinstance(config, RunConfig)
    file = tmp_path / "x.yaml"
    file.write_text(config.to_yaml())
    assert mvit.load_config(file) == config
