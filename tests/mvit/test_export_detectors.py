"""A detector with running statistics is exported whole: what the run evaluates is what the file finds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mvit
import mvit.export
from mvit.checkpoint import CheckpointError, checkpoint_path, read_manifest
from mvit.checkpoint_load import read_buffers, whole_state, whole_weights
from mvit.config import RunConfig
from mvit.detection.detector import Detector
from mvit.export import export_weights, load_model
from mvit.export_formats import write_safetensors
from mvit.prediction_results import Detected
from mvit.starting_weights import starting_weights
from mvit.tasks import create_task
from tests.data_pipeline.pictures import encoded
from tests.mvit.synthetic_checkpoint import buffer_of, write_checkpoint
from tests.mvit.test_detection_training import detection_config, shapes
from tests.mvit.test_training import records

__all__ = ["shapes"]  # a fixture

STEPS = 4
CASCADE = {"kind": "cascade_mask_rcnn", "box_channels": 8, "head_norm": "sync_batch", "score_threshold": 0.0}
AP = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "box_ar100", "mask_ar100")
SUFFIXES = {"safetensors": ".safetensors", "facebook": ".pyth", "torch": ".pth"}


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return the config of a cascade whose heads' batch norms were trained for four steps, with a moving average."""
    config = detection_config(
        shapes,
        tmp_path_factory.mktemp("cascade"),
        detector=CASCADE,
        schedule={"epochs": 1},
        train={"log_every": 2, "evaluate_every": STEPS},
        optim={"ema_decay": 0.5, "layer_decay": 0.9},
    )
    mvit.train(config, show_progress=False)
    return config


def content_of(path: Path) -> dict[str, Tensor]:
    content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return content.get("model_state", content)


def checkpoint(config: RunConfig) -> Path:
    return checkpoint_path(config.run_dir, STEPS)


@pytest.mark.parametrize("format", SUFFIXES)
def test_every_format_holds_the_weights_and_the_running_statistics(
    trained: RunConfig, tmp_path: Path, format: Any
) -> None:
    statistics = read_buffers(read_manifest(checkpoint(trained)))
    assert {int(number) for name, number in statistics.items() if name.endswith("num_batches_tracked")} == {2 * STEPS}
    moved = [value for name, value in statistics.items() if name.endswith("running_var")]
    assert len(moved) == 3 * 4 + 4  # of the box heads and the mask head
    assert all((value != 1).all() for value in moved)
    found = {}
    for ema in (False, True):
        out = export_weights(trained.run_dir, tmp_path / f"{ema}{SUFFIXES[format]}", format=format, ema=ema)
        found[ema] = content_of(out)
        wanted = dict(whole_weights(checkpoint(trained), ema=ema)) | statistics
        assert found[ema].keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[ema][name].dtype == value.dtype, name
            assert torch.equal(found[ema][name], value), name
    name = "mask_branch.head.predictor.weight"
    assert not torch.equal(found[False][name], found[True][name])


def test_run_and_exports_evaluate_and_predict_alike(trained: RunConfig, tmp_path: Path) -> None:
    files = [export_weights(trained.run_dir, tmp_path / name) for name in ("w.safetensors", "w.pth")]
    figures = mvit.evaluate(trained, trained.run_dir, show_progress=False)
    for file in files:
        assert mvit.evaluate(trained, file, show_progress=False) == figures
    (tmp_path / "a.png").write_bytes(encoded(1, 64, 64, "PNG"))
    (whole,) = mvit.predict(tmp_path / "a.png", trained.run_dir, score=0.0)
    assert isinstance(whole, Detected)
    assert whole.objects
    assert mvit.predict(tmp_path / "a.png", files[0], score=0.0) == [whole]

    # The average, with the run's own statistics, is what the trainer evaluated as the average.
    averaged = export_weights(trained.run_dir, tmp_path / "ema.safetensors", ema=True)
    (told,) = records(trained.run_dir, "evaluate_ema")
    for source, ema in ((averaged, False), (trained.run_dir, True)):
        again = mvit.evaluate(trained, source, show_progress=False, ema=ema)
        assert [again[key] for key in AP] == pytest.approx([told[key] for key in AP], abs=1e-6)


def test_the_model_of_a_file_and_a_run_that_starts_from_one_have_its_statistics(
    trained: RunConfig, tmp_path: Path
) -> None:
    out = export_weights(trained.run_dir, tmp_path / "w.safetensors", ema=True)
    wanted = dict(whole_state(checkpoint(trained), ema=True))
    task = create_task(trained)
    for source in (out, starting_weights(trained.run_dir)[0]):
        model = task.build_model()
        report = task.load_weights(model, source)
        assert report == f"the detector: {len(wanted)} tensors loaded"
        for started in (model, load_model(out)):
            assert isinstance(started, Detector)
            state = started.state_dict()
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    bare = {name: tensor for name, tensor in wanted.items() if not name.endswith("running_mean")}
    with pytest.raises(ValueError, match="16 tensors are missing"):
        task.load_weights(task.build_model(), bare)


def test_an_exported_detector_gives_its_backbone(trained: RunConfig, tmp_path: Path) -> None:
    wanted = dict(whole_weights(checkpoint(trained)))
    backbone = mvit.create_backbone(trained.model.resolved_variant(), window_size=8)
    for name in ("w.safetensors", "w.pth", "w.pyth"):
        out = export_weights(trained.run_dir, tmp_path / name, verify=False)
        report = mvit.load_weights(backbone, out)
        assert report.naming == "detector"
        assert report.missing == ()
        assert len(report.loaded) + len(report.unexpected) == len(content_of(out))
        for ours, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, wanted[f"pyramid.backbone.{ours}"])


def test_every_number_lies_where_a_processor_wants_it(trained: RunConfig, tmp_path: Path) -> None:
    raw = export_weights(trained.run_dir, tmp_path / "w.safetensors", verify=False).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    widths = {"I64": 8, "F32": 4}
    assert {entry["dtype"] for entry in header.values()} == widths.keys()
    assert all((8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("which", ["running_mean", "num_batches_tracked"])
def test_a_statistic_that_changes_on_the_way_is_noticed(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    config = detection_config(shapes, tmp_path, detector=CASCADE)
    made = write_checkpoint(config, num_ranks=2)
    name = f"mask_branch.head.convs.0.1.{which}"
    statistics = read_buffers(read_manifest(made))
    assert torch.equal(statistics[name], buffer_of(name, statistics[name]))

    def spoil(path: Path, tensors: Any, *rest: Any) -> None:
        write_safetensors(path, ((n, t + 1 if n == name else t) for n, t in tensors), *rest)

    export_weights(config.run_dir, tmp_path / "good.safetensors")
    monkeypatch.setattr(mvit.export, "write_safetensors", spoil)
    for suffix in SUFFIXES.values():
        with pytest.raises(CheckpointError, match=rf"{which} differs after reading back; nothing was exported"):
            export_weights(config.run_dir, tmp_path / f"w{suffix}")


def test_timm_has_no_detectors(shapes: Path, tmp_path: Path) -> None:
    config = detection_config(shapes, tmp_path, detector=CASCADE)
    write_checkpoint(config)
    with pytest.raises(ValueError, match="format 'timm': timm has no detectors; export as safetensors"):
        export_weights(config.run_dir, tmp_path / "w.safetensors", format="timm")
