"""Detection runs end to end on drawn shapes: the same at every ZeRO stage, exact after a kill, each picture once."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mvit
from data_pipeline.pack import PackOptions, pack
from data_pipeline.pack_coco import ANNOTATED_PICTURES
from data_pipeline.reads import Item
from data_pipeline.sources import SourceData
from data_pipeline.sources.shapes import read_shapes
from data_pipeline.synthetic import SyntheticBatches
from mvit.checkpoint import checkpoint_path, list_steps, read_manifest
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.distributed import RankInfo
from mvit.export import export_weights, load_model
from mvit.run_data import open_data
from mvit.tasks import create_task
from tests.data_pipeline.scenes import png
from tests.mvit.test_training import _train, _train_and_die, records
from tests.ranks import run_distributed, run_until_killed

TOTAL_STEPS, SAVE_EVERY, NUM_VALIDATION = 20, 10, 5


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of 16 training pictures, one of them without objects, and 5 validation pictures."""
    folder = tmp_path_factory.mktemp("shapes") / "shards"
    drawn = read_shapes()
    empty = [s for s in drawn.splits["train"] if not json.loads(s.members["json"])["annotations"]][:1]
    full = [s for s in drawn.splits["train"] if s not in empty][:15]
    splits = {"train": full + empty, "validation": drawn.splits["validation"][:NUM_VALIDATION]}
    few = SourceData(drawn.origin, drawn.class_names, splits, drawn.rule, facts=drawn.facts)
    pack(few, folder, PackOptions(max_samples=8, workers=1), None, ANNOTATED_PICTURES)
    return folder


def detection_config(shapes: Path, output_dir: Path, name: str = "run", **sections: Any) -> RunConfig:
    """Return a run of 20 steps, five epochs of 16 pictures."""
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(output_dir),
        "task": "detection",
        "model": {"num_classes": 4, "embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path": 0.2},
        "data": {"train": f"{shapes}/train", "validation": f"{shapes}/validation", "num_workers": 0},
        "detection": {
            "short_sides": (64, 96),
            "crop_short_sides": (96,),
            "crop_range": (64, 96),
            "test_short_side": 64,
            "skip_empty": False,
        },
        "detector": {
            "kind": "mask_rcnn",
            "window_size": 8,
            "pyramid_channels": 16,
            "box_features": 32,
            "mask_channels": 8,
            "proposals_before_nms": 100,
            "proposals_before_nms_test": 50,
            "proposals_after_nms": 30,
            "proposal_batch_size": 32,
            "box_batch_size": 16,
            "detections_per_image": 10,
        },
        "optim": {"lr": 1e-3, "lr_batch_size": 4, "ema_decay": 0.9},
        "schedule": {"epochs": 5, "warmup_steps": 2, "shape": "steps", "milestones": (0.5, 0.75)},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "log_every": 1,
            "save_every": SAVE_EVERY,
            "evaluation_batch_size": 2,
        },
        "zero": {"stage": 2},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return parse_config(tree)


def losses(config: RunConfig) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in ("step", "loss", "lr", "grad_norm")) for record in records(config.run_dir)]


@pytest.mark.timeout(900)
def test_a_detection_run_is_the_same_at_every_stage_and_after_a_kill(shapes: Path, tmp_path: Path) -> None:
    whole = detection_config(shapes, tmp_path, "whole")
    others = [detection_config(shapes, tmp_path, f"stage{stage}", zero={"stage": stage}) for stage in (0, 1, 3)]
    others.append(detection_config(shapes, tmp_path, "recomputing", train={"activation_checkpointing": "all"}))
    cascade_heads = {"kind": "cascade_mask_rcnn", "box_channels": 8}
    cascade = detection_config(
        shapes, tmp_path, "cascade", detector=cascade_heads, zero={"stage": 3}, schedule={"epochs": 1}
    )
    # The kill comes seven steps after a save, which must be on disk by then however slow the disk.
    killed = detection_config(shapes, tmp_path, "killed", train={"async_save": False})
    run_distributed(_train, 2, [config.model_dump(mode="json") for config in (whole, *others, cascade)])
    run_until_killed(_train_and_die, 2, killed.model_dump(mode="json"), "step")
    run_distributed(_train, 2, [killed.model_dump(mode="json")])

    expected = losses(whole)
    assert [step for step, *_ in expected] == list(range(1, TOTAL_STEPS + 1))
    peak = 1e-3
    assert [lr for _, _, lr, _ in expected] == pytest.approx(
        [1e-8, (1e-8 + peak) / 2, *[peak] * 8, *[peak / 10] * 5, *[peak / 100] * 5]
    )
    for record in records(whole.run_dir):
        parts = {key: value for key, value in record.items() if key.startswith("loss_")}
        assert len(parts) == 5, parts.keys()
        assert sum(parts.values()) == pytest.approx(record["loss"], rel=1e-5)
    for other in others:
        assert [loss for _, loss, *_ in losses(other)] == pytest.approx([x for _, x, *_ in expected], rel=1e-4), other
    assert all(loss < 20 for _, loss, *_ in losses(cascade))
    assert list_steps(cascade.run_dir) == [4]

    # The kill: not one bit differs, of what was computed or of what was saved.
    assert losses(killed) == expected
    manifests = [read_manifest(checkpoint_path(config.run_dir, TOTAL_STEPS)) for config in (whole, killed)]
    assert [file["sha256"] for file in manifests[0].files] == [file["sha256"] for file in manifests[1].files]

    # Truth and finds in TensorBoard; an evaluation here counts the same pictures as the two ranks did.
    events = EventAccumulator(str(whole.run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"inputs/augmented", "validation/predictions"}
    assert {"validation/box_ap50", "train/loss_rpn_objectness"} <= set(events.Tags()["scalars"])
    figures = mvit.evaluate(whole, whole.run_dir, show_progress=False)
    assert figures["images"] == NUM_VALIDATION
    last = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = next(record for record in reversed(last) if record["kind"] == "evaluate")
    assert figures["box_ap"] == pytest.approx(trained["box_ap"], abs=1e-4)

    # The exported file builds the detector again, and gives the same figures.
    out = export_weights(whole.run_dir, tmp_path / "detector.safetensors")
    assert mvit.evaluate(whole, out, show_progress=False) == figures
    found = load_model(out)(torch.zeros(1, 3, 64, 64), [(64, 64)])
    assert found[0].boxes.shape[1] == 4


def test_a_detector_trains_and_is_shown_on_synthetic_batches(shapes: Path, tmp_path: Path) -> None:
    task = create_task(detection_config(shapes, tmp_path))
    model = task.build_model().train()
    for batch in islice(SyntheticBatches((64, 96), 4, 2, num_objects=3), 3):
        found = task.losses(model, batch, seed=0, dtype=torch.float32)
        assert all(loss.isfinite() for loss in found.values())
        assert task.preview(batch, seed=0, limit=1).shape == (1, 3, 64, 96)


def test_pictures_without_objects_are_left_out_unless_asked_for(shapes: Path, tmp_path: Path) -> None:
    alone = RankInfo(0, 0, 1, torch.device("cpu"))
    sizes = [
        len(open_data(detection_config(shapes, tmp_path, detection={"skip_empty": skip}), alone)[0])
        for skip in (True, False)
    ]
    assert sizes == [15, 16]


def test_a_wrong_number_of_classes_is_refused_before_the_start(shapes: Path, tmp_path: Path) -> None:
    alone = RankInfo(0, 0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model.num_classes = 80, but the shards have 4 categories"):
        open_data(detection_config(shapes, tmp_path, model={"num_classes": 80}), alone)


def test_masks_in_one_section_only_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"detector.masks = False, but detection.masks = True"):
        detection_config(shapes, tmp_path, detector={"masks": False})


def test_what_is_found_in_a_picture_depends_on_no_other_of_its_batch(shapes: Path, tmp_path: Path) -> None:
    config = detection_config(shapes, tmp_path)
    task = create_task(config)
    torch.manual_seed(0)
    model = task.build_model().eval()
    transform = task.transform(train=False)
    encoded = [png(1, 48, 64), png(2, 96, 40)]
    items = [Item(transform.unlabelled(data), number, str(number), 1.0) for number, data in enumerate(encoded)]
    with torch.no_grad():
        together = task.predict(model, task.collate(items), dtype=torch.float32)
        alone = [task.predict(model, task.collate([item]), dtype=torch.float32)[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert len(one) > 0
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
