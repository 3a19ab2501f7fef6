"""Video runs end to end on small clips: exact after a kill and on other ranks; a test counts each video once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mvit
from data_pipeline.synthetic import SyntheticBatches
from mvit import distributed
from mvit.checkpoint import checkpoint_path, list_steps, read_manifest
from mvit.checkpoint_load import whole_weights
from mvit.config import RunConfig, parse_config
from mvit.evaluation import evaluation_loader, open_validation
from mvit.export import export_weights, load_model
from mvit.run_identity import differences
from mvit.tasks import create_task
from mvit.tasks.video_classification import VideoClassification
from tests.data_pipeline.clips import clip
from tests.data_pipeline.pictures import write_shards
from tests.mvit.test_training import _train, _train_and_die, _train_and_stop, records
from tests.ranks import run_distributed, run_until_killed

TOTAL_STEPS, SAVE_EVERY, NUM_VALIDATION = 20, 10, 7


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of 16 training and 7 validation videos of 64x48 pixels and 30 to 45 frames."""
    folder = tmp_path_factory.mktemp("videos")
    samples = [{"mp4": clip(30 + i % 16, rate=20 + i % 12), "cls": str(i % 3).encode()} for i in range(23)]
    write_shards(folder / "train", samples[:16], 8)
    write_shards(folder / "validation", samples[16:], 4)
    return folder


def video_config(videos: Path, output_dir: Path, name: str = "run", **sections: Any) -> RunConfig:
    """Return a run of 20 steps (4 are an epoch: 16 videos, each twice) with everything random switched on."""
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(output_dir),
        "task": "video_classification",
        "model": {"num_classes": 3, "embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path": 0.2, "head_dropout": 0.5},
        "data": {"train": f"{videos}/train", "validation": f"{videos}/validation", "num_workers": 0},
        "video": {
            "image_size": (32, 32),
            "num_frames": 4,
            "frame_stride": 3,
            "rand_augment": "rand-m5-n1-mstd0.5-inc1",
            "repeats": 2,
            "short_side": 36,
            "num_clips": 2,
            "num_crops": 3,
        },
        "optim": {"algorithm": "sgd", "lr": 1e-2, "lr_batch_size": 8, "ema_decay": 0.9},
        "schedule": {"epochs": 5, "warmup_epochs": 1},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "fp32",
            "log_every": 1,
            "evaluate_every": 12,
            "save_every": SAVE_EVERY,
        },
        "zero": {"stage": 2},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return parse_config(tree)


def losses(config: RunConfig) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in ("step", "loss", "lr", "grad_norm")) for record in records(config.run_dir)]


def _train_each_then_stop(configs: list[dict[str, Any]], stopped: dict[str, Any], after: int) -> None:
    _train(configs)
    _train_and_stop(stopped, after)


@pytest.mark.timeout(900)
def test_a_video_run_survives_a_kill_bit_for_bit_and_another_world_size_and_is_exported(
    videos: Path, tmp_path: Path
) -> None:
    whole = video_config(videos, tmp_path, "whole")
    recomputing = video_config(videos, tmp_path, "recomputing", train={"activation_checkpointing": "all"})
    # The kill comes seven steps after a save, which must be on disk by then however slow the disk.
    killed = video_config(videos, tmp_path, "killed", train={"async_save": False})
    elastic = video_config(videos, tmp_path, "elastic")
    dumps = [config.model_dump(mode="json") for config in (whole, recomputing)]
    run_distributed(_train_each_then_stop, 2, dumps, elastic.model_dump(mode="json"), 12)
    run_until_killed(_train_and_die, 2, killed.model_dump(mode="json"), "step")
    assert list_steps(killed.run_dir) == [SAVE_EVERY]
    run_distributed(_train, 2, [killed.model_dump(mode="json")])
    expected = losses(whole)
    assert [step for step, *_ in expected] == list(range(1, TOTAL_STEPS + 1))
    assert [record["epoch"] for record in records(whole.run_dir)] == [step / 4 for step in range(1, TOTAL_STEPS + 1)]

    # The kill: not one bit differs, of what was computed or of what was saved.
    assert losses(killed) == expected
    manifests = [read_manifest(checkpoint_path(config.run_dir, TOTAL_STEPS)) for config in (whole, killed)]
    assert [file["sha256"] for file in manifests[0].files] == [file["sha256"] for file in manifests[1].files]
    assert manifests[0].state["data"] == manifests[1].state["data"]
    assert manifests[0].state["data"]["repeats"] == 2
    assert "momentum_buffer" in manifests[0].files[0]["states"]

    # Recomputed activations change nothing; nor does another number of ranks, but for the order of sums.
    assert [loss for _, loss, *_ in losses(recomputing)] == pytest.approx([x for _, x, *_ in expected], rel=1e-5)
    assert list_steps(elastic.run_dir) == [SAVE_EVERY, 13]
    finished = mvit.train(elastic, show_progress=False)
    assert (finished.step, finished.metrics["samples"]) == (TOTAL_STEPS, NUM_VALIDATION)
    assert [loss for _, loss, *_ in losses(elastic)] == pytest.approx([x for _, x, *_ in expected], rel=1e-4)

    # Clips in TensorBoard; the test over all views; the official naming, which is SlowFast's.
    events = EventAccumulator(str(whole.run_dir / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["inputs/augmented"]
    figures = mvit.evaluate(whole, whole.run_dir, show_progress=False)
    assert figures["samples"] == NUM_VALIDATION
    out = export_weights(whole.run_dir, tmp_path / "official.pyth")
    exported = torch.load(out, weights_only=True)["model_state"]
    assert exported["patch_embed.proj.weight"].shape == (16, 3, 3, 7, 7)
    assert "blocks.0.attn.rel_pos_t" in exported
    assert mvit.evaluate(whole, out, show_progress=False) == figures
    rebuilt = load_model(export_weights(whole.run_dir, tmp_path / "own.safetensors", ema=True))
    assert rebuilt(torch.zeros(2, 3, 4, 32, 32)).shape == (2, 3)
    saved = dict(whole_weights(checkpoint_path(whole.run_dir, TOTAL_STEPS), ema=True))
    assert torch.equal(load_file(tmp_path / "own.safetensors")["head.projection.bias"], saved["head.projection.bias"])
    with pytest.raises(ValueError, match="timm has no video MViTv2"):
        export_weights(whole.run_dir, tmp_path / "timm.pth", format="timm")


# --- the test over all views --------------------------------------------------------------------------------------


def _tested(
    configs: list[dict[str, Any]], state: dict[str, torch.Tensor]
) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Return this rank's (probabilities by key, all ranks' figures) for each config."""
    ranks, found = distributed.start(), []
    for tree in configs:
        config = parse_config(tree)
        task, shards = create_task(config), open_validation(config)
        model = task.build_model().eval()
        task.load_weights(model, state)
        loader = evaluation_loader(config, task, shards, ranks, all_views=True)
        own: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for batch in loader:
                rows = task.predict(model, batch, dtype=torch.float32).exp()
                own |= {key: row for key, row, w in zip(batch.keys, rows, batch.weights, strict=True) if w > 0}
        found.append((own, mvit.evaluate(config, state, show_progress=False)))
    return found


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("alone")
def test_multi_view_results_depend_on_no_number_of_ranks_and_no_batch_size(videos: Path, tmp_path: Path) -> None:
    configs = [
        video_config(videos, tmp_path, train={"evaluation_batch_size": size}).model_dump(mode="json")
        for size in (1, 4, 6, 13, 64)
    ]
    torch.manual_seed(1)
    task = create_task(parse_config(configs[0]))
    model = task.build_model().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)  # predictions far from even
    state = model.state_dict()
    with torch.no_grad():  # the yardstick: video by video, view by view
        transform, shards = task.transform(train=False, all_views=True), open_validation(parse_config(configs[0]))
        expected = {}
        for i in range(NUM_VALIDATION):
            views = torch.from_numpy(transform(shards.read(i), 0)[0]).permute(0, 4, 1, 2, 3)
            assert views.shape == (6, 3, 4, 32, 32)
            rows = [model((view[None] / 255 - 0.45) / 0.225).softmax(-1)[0] for view in views]
            expected[shards.key(i)] = torch.stack(rows).mean(0)
    assert max(float(row.max()) for row in expected.values()) > 0.5
    by_world = {1: [_tested(configs, state)]} | {n: run_distributed(_tested, n, configs[::2], state) for n in (2, 3)}
    for by_rank in by_world.values():
        for number in range(len(by_rank[0])):
            parts = [found[number] for found in by_rank]
            keys = [key for own, _ in parts for key in own]
            assert sorted(keys) == sorted(expected), "each video exactly once"
            for key, row in (item for own, _ in parts for item in own.items()):
                assert torch.allclose(row, expected[key], atol=1e-5)
            labels = {shards.key(i): i for i in range(NUM_VALIDATION)}
            hits = sum(int(expected[key].argmax()) == (16 + labels[key]) % 3 for key in expected)
            loss = -sum(float(expected[key][(16 + labels[key]) % 3].log()) for key in expected) / NUM_VALIDATION
            for _, figures in parts:
                assert figures["samples"] == NUM_VALIDATION
                assert figures["top1"] == pytest.approx(hits / NUM_VALIDATION)
                assert figures["loss"] == pytest.approx(loss, rel=1e-4)


def test_during_training_one_centre_view_is_evaluated_and_in_the_test_all(videos: Path, tmp_path: Path) -> None:
    config = video_config(videos, tmp_path, train={"evaluation_batch_size": 13})
    task = create_task(config)
    members = open_validation(config).read(0)
    assert task.transform(train=False)(members, 0)[0].shape == (1, 4, 32, 32, 3)
    assert task.transform(train=False, all_views=True)(members, 0)[0].shape == (6, 4, 32, 32, 3)
    assert task.transform(train=True)(members, 0)[0].shape == (4, 32, 32, 3)
    assert (task.evaluation_samples(13), task.evaluation_samples(13, all_views=True)) == (13, 2)
    assert task.evaluation_samples(5, all_views=True) == 1


def test_the_preview_shows_each_clip_as_a_strip_of_its_frames(videos: Path, tmp_path: Path) -> None:
    config = video_config(videos, tmp_path, video={"random_erasing_prob": 0, "mix_prob": 0, "num_frames": 12})
    batch = next(iter(SyntheticBatches(config.input_size, 3, 4)))
    strips = VideoClassification(config).preview(batch, seed=0, limit=3)
    assert strips.shape == (3, 3, 32, 8 * 32)
    assert torch.allclose(strips[1, :, :, :32], batch.clips[1, :, 0] / 255, atol=1e-6)
    assert torch.allclose(strips[1, :, :, -32:], batch.clips[1, :, 11] / 255, atol=1e-6)


def test_another_number_of_repeats_is_another_run(videos: Path, tmp_path: Path) -> None:
    before, after = video_config(videos, tmp_path), video_config(videos, tmp_path, video={"repeats": 1})
    assert differences(before, after) == ["video.repeats: 2 -> 1"]
