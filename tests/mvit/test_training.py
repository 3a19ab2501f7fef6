"""Whole training runs on real digits: they survive kill -9, damaged files and full disks, and say what went wrong."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mvit
import mvit.checkpoint_save
from mvit.checkpoint import CheckpointError, checkpoint_path, list_steps, read_manifest
from mvit.checkpoint_save import SaveError
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.guard import NonFiniteError
from mvit.retention import Retention, prune_after_save
from tests.ranks import run_distributed, run_until_killed

TOTAL_STEPS, SAVE_EVERY = 24, 10


def tiny_config(digits: str | Path, output_dir: str | Path, name: str = "run", **sections: Any) -> RunConfig:
    """Return a run of 24 steps over the digits (22.5 steps are an epoch) with everything random switched on."""
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(output_dir),
        "model": {"num_classes": 10, "embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path": 0.2, "head_dropout": 0.1},
        "data": {"train": f"{digits}/train", "validation": f"{digits}/validation", "num_workers": 0},
        "image": {"image_size": (32, 32), "rand_augment": "rand-m5-n1-mstd0.5-inc1"},
        "optim": {"lr": 1e-3, "lr_batch_size": 64, "ema_decay": 0.9},
        "schedule": {"epochs": 1.09, "warmup_epochs": 0.2},
        "train": {
            "global_batch_size": 64,
            "micro_batch_size": 16,
            "precision": "fp32",
            "log_every": 1,
            "evaluate_every": 12,
            "save_every": SAVE_EVERY,
        },
        "zero": {"persistence_threshold": 0},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree)


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# --- functions that run on the ranks --------------------------------------------------------------------------


def _train(configs: list[dict[str, Any]]) -> list[Any]:
    found = [mvit.train(parse_config(config), show_progress=False) for config in configs]
    return [(result.step, result.stopped, result.metrics) for result in found]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(config: dict[str, Any], moment: str) -> None:
    """Train until `moment`, then kill this process in the middle of it."""
    rank, calls = int(os.environ["RANK"]), 0

    def in_step() -> bool:
        nonlocal calls
        calls += 1
        if moment == "step" and rank == 1 and calls == 17:
            _die()
        return False

    real_write, real_publish = mvit.checkpoint_save.write_shard, mvit.checkpoint_save.publish

    def write(path: Path, *args: Any) -> dict[str, Any]:
        if moment == "shard" and rank == 1 and "00000020" in str(path):
            path.write_bytes(b"half a shard")
            _die()
        return real_write(path, *args)

    def publish(part: Path, target: Path, *rest: Any) -> None:
        if moment == "publish" and target.name.endswith("20"):
            (part / "manifest.json").write_text("{")
            _die()
        real_publish(part, target, *rest)

    mvit.checkpoint_save.write_shard, mvit.checkpoint_save.publish = write, publish
    mvit.train(parse_config(config), stop_requested=in_step, show_progress=False)


# --- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_after_kill_9_every_stage_continues_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    """Losses, weights, moments, average and random state equal the undisturbed run's, wherever the kill hits."""
    moments = {0: "step", 1: "shard", 2: "step", 3: "publish"}
    configs = {
        where: [tiny_config(digits, tmp_path / where, f"stage{stage}", zero={"stage": stage}) for stage in moments]
        for where in ("undisturbed", "killed")
    }
    dumps = {where: [config.model_dump(mode="json") for config in some] for where, some in configs.items()}
    run_distributed(_train, 2, dumps["undisturbed"])
    for dump, moment in zip(dumps["killed"], moments.values(), strict=True):
        run_until_killed(_train_and_die, 2, dump, moment)
    for config in configs["killed"]:
        assert list_steps(config.run_dir) == [SAVE_EVERY], "the kill came at another moment than planned"
    run_distributed(_train, 2, dumps["killed"])
    for undisturbed, killed in zip(configs["undisturbed"], configs["killed"], strict=True):
        losses = [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records(killed.run_dir)]
        assert losses == [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records(undisturbed.run_dir)]
        assert [step for step, *_ in losses] == list(range(1, TOTAL_STEPS + 1))
        manifests = [
            read_manifest(c.run_dir / "checkpoints" / f"step_{TOTAL_STEPS:08d}") for c in (undisturbed, killed)
        ]
        hashes = [[file["sha256"] for file in manifest.files] for manifest in manifests]
        assert hashes[0] == hashes[1], killed.name
        assert manifests[0].state["data"] == manifests[1].state["data"]
        assert not list((killed.run_dir / "checkpoints").glob(".step_*")), "rests of the save that died"


def test_another_world_size_and_stage_continue_with_the_same_batches(digits: Path, tmp_path: Path) -> None:
    first = tiny_config(digits, tmp_path, zero={"stage": 1})
    whole = tiny_config(digits, tmp_path, "whole", zero={"stage": 1})
    run_distributed(_train_and_stop, 2, first.model_dump(mode="json"), 14)
    other = tiny_config(digits, tmp_path, zero={"stage": 3, "persistence_threshold": 0})
    run_distributed(_train, 1, [other.model_dump(mode="json"), whole.model_dump(mode="json")])
    mixed, alone = ([r["loss"] for r in records(c.run_dir)] for c in (first, whole))
    assert len(mixed) == TOTAL_STEPS
    assert mixed == pytest.approx(alone, rel=1e-4)


def _train_and_stop(config: dict[str, Any], after: int) -> tuple[int, bool]:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls >= after and os.environ["RANK"] == "1"

    result = mvit.train(parse_config(config), stop_requested=stop, show_progress=False)
    return result.step, result.stopped


# --- one process: what can go wrong ---------------------------------------------------------------------------


def test_a_stop_saves_and_the_curves_stay_one_line(train: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = train(stop_after=13)
    assert (stopped.step, stopped.stopped) == (14, True)  # one step after the request: the ranks agree first
    assert list_steps(run_dir) == [10, 14]
    # A later, lost attempt leaves points behind that the next one does again.
    lost = json.dumps({"kind": "train", "step": 15, "loss": 99.0})
    (run_dir / "metrics.jsonl").open("a").write(lost + "\n" + '{"kind": "train", "st')
    finished = train()
    assert (finished.step, finished.stopped) == (TOTAL_STEPS, False)
    assert [r["step"] for r in records(run_dir)] == list(range(1, TOTAL_STEPS + 1))
    assert all(r["loss"] < 90 for r in records(run_dir))
    assert finished.metrics["samples"] == 355
    assert 0 < finished.metrics["ema_loss"] < 10
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "speed/samples_per_second"} <= scalars
    assert {"speed/data_wait_share", "memory/peak_gib", "validation/top1", "validation/top5"} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, TOTAL_STEPS + 1))
    assert events.Tags()["images"] == ["inputs/augmented"]
    assert "global_batch_size: 64" in str(events.Tensors("config/text_summary")[0].tensor_proto)


def test_a_damaged_checkpoint_is_passed_over_loudly(
    train: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(stop_after=15)
    newest = tmp_path / "run" / "checkpoints" / "step_00000016"
    shard = newest / "rank_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    caplog.clear()
    train(stop_after=1)
    assert "step 16 is damaged" in caplog.text
    assert "differs from its SHA-256" in caplog.text
    assert "continuing after step 10" in caplog.text


def test_pruning_counts_no_damaged_checkpoint_among_the_newest(tmp_path: Path) -> None:
    for step in (10, 12, 50, 60):  # the run fell back from 60 and 50 to 10 and has just published 12
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    prune_after_save(tmp_path, 12, Retention(keep_last=1))
    assert list_steps(tmp_path) == [12, 50, 60]
    checkpoint_path(tmp_path, 62).mkdir()
    prune_after_save(tmp_path, 62, Retention(keep_last=1))
    assert list_steps(tmp_path) == [62]


def test_vanished_checkpoints_are_never_taken_for_a_fresh_start(
    train: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    train(stop_after=15)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000016")
    train(stop_after=1)
    assert "checkpoint of step 16 was published" in caplog.text
    for path in checkpoints.glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="none is usable"):
        train()


def test_a_full_disk_does_not_end_the_run_but_the_last_save_must_succeed(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = mvit.checkpoint_save.write_shard
    full = {10: True, 20: False, TOTAL_STEPS: True}

    def write(path: Path, *args: Any) -> dict[str, Any]:
        if full[int(path.parent.name.split(".")[1].removeprefix("step_"))]:
            raise OSError(28, "No space left on device")
        return real(path, *args)

    monkeypatch.setattr(mvit.checkpoint_save, "write_shard", write)
    with pytest.raises(SaveError, match=r"step 24 was not saved \(rank 0: OSError: .*No space left"):
        train()
    assert "the checkpoint of step 10 was not saved" in caplog.text
    assert "training goes on" in caplog.text
    assert list_steps(tmp_path / "run") == [20]
    assert records(tmp_path / "run")[-1]["failed_saves"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_samples_and_checkpoint(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mvit.tasks.image_classification import ImageClassification

    real, calls = ImageClassification.losses, 0

    def losses(self: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = real(self, *args, **options)
        return {key: value * (float("nan") if calls == 4 * 12 + 1 else 1) for key, value in found.items()}

    monkeypatch.setattr(ImageClassification, "losses", losses)
    with pytest.raises(NonFiniteError, match=r"step 13: the loss .*last good checkpoint is .*step_00000010") as caught:
        train(train={"log_every": 5})
    assert "shard-0" in str(caught.value)
    assert list_steps(tmp_path / "run") == [10], "broken weights were saved"
    listed = json.loads((tmp_path / "run" / "non_finite_step_00000013.json").read_text())
    assert len(listed["keys"]) == 64


def test_a_run_folder_of_another_run_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    train(stop_after=1)
    with pytest.raises(ConfigError, match=r"belongs to another run; it differs in optim.lr: 0.001 -> 0.002"):
        train(optim={"lr": 2e-3})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run"):
        train(name="notes")


def test_what_cannot_run_is_refused_before_the_first_step(
    train: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="fp16 does not run on CPUs"):
        train(train={"precision": "fp16"})
    with pytest.raises(ConfigError, match="less than one step"):
        train(schedule={"epochs": 0.01, "warmup_epochs": 0})
    with pytest.raises(ValueError, match=r"label.*9|9.*label"):
        train(model={"num_classes": 9})
    with pytest.raises(ValueError, match="nowhere"):
        train(data={"train": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"data\.train = None"):
        train(data={"train": None})


def test_no_disk_space_is_found_before_the_first_step(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"one checkpoint takes .* are free"):
        train()


def test_evaluation_of_a_run_folder_equals_the_training_s_own(
    train: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    from mvit.checkpoint_load import whole_weights
    from mvit.export import export_weights

    result = train()
    config = tiny_config(digits, tmp_path)
    again = mvit.evaluate(config, config.run_dir, show_progress=False)
    averaged = mvit.evaluate(config, config.run_dir, ema=True, show_progress=False)
    assert {key: again[key] for key in ("top1", "top5", "samples")} == {
        key: result.metrics[key] for key in ("top1", "top5", "samples")
    }
    assert averaged["loss"] == pytest.approx(result.metrics["ema_loss"], rel=1e-5)
    for format, suffix in (("safetensors", "safetensors"), ("timm", "safetensors"), ("facebook", "pyth")):
        file = export_weights(config.run_dir, tmp_path / f"{format}.{suffix}", format=format)  # type: ignore[arg-type]
        assert mvit.evaluate(config, file, show_progress=False)["loss"] == pytest.approx(again["loss"], rel=1e-6)
    saved = dict(whole_weights(checkpoint_path(config.run_dir, TOTAL_STEPS)))
    rebuilt = mvit.load_model(tmp_path / "timm.safetensors")
    assert torch.equal(rebuilt.state_dict()["head.projection.bias"], saved["head.projection.bias"])
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        mvit.load_model(tmp_path / "facebook.pyth")
