"""A model exported as a program answers as the run's own, for any batch, and says what its inputs are."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import mvit.export_program
from launcher.cli import main
from mvit.checkpoint import CheckpointError
from mvit.config import RunConfig, parse_config
from mvit.export import export_weights, load_model
from mvit.export_program import TOLERANCE, export_program
from tests.mvit.synthetic_checkpoint import untrained, write_checkpoint

with_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return untrained(tmp_path_factory.mktemp("run"), depths=(1, 1, 1, 1), image_size=(32, 48))


@pytest.fixture(scope="module")
def weights(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_weights(run.run_dir, tmp_path_factory.mktemp("file") / "w.safetensors", verify=False)


def test_torch_s_program_takes_any_batch_and_says_what_it_is(run: RunConfig, weights: Path, tmp_path: Path) -> None:
    program = export_program(run.run_dir, tmp_path / "deep" / "model.pt2")
    assert program.difference is not None
    assert program.difference <= TOLERANCE
    assert program.files == (tmp_path / "deep" / "model.pt2",)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt2"]
    extra = {"mvit.json": ""}
    module = torch.export.load(program.path, extra_files=extra).module()
    facts = json.loads(extra["mvit.json"])
    assert facts["input_shape"] == ["B", 3, 32, 48]
    assert (facts["input"], facts["softmax"], len(facts["class_names"])) == ("images", "not applied", 10)
    assert facts["mean"] == list(run.image.mean)
    assert parse_config(facts["recipe"]) == run
    own = load_model(weights)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 48)
        with torch.no_grad():
            assert torch.allclose(module(images), own(images), atol=1e-5)


@with_onnx
@pytest.mark.parametrize("batch", [None, 2])
def test_onnx_answers_as_the_run_for_open_and_fixed_batches(
    weights: Path, tmp_path: Path, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixed one is made as weights are that are too large for one file: they lie beside it."""
    import onnxruntime

    if batch is not None:
        monkeypatch.setattr(mvit.export_program, "_MAX_ONE_FILE", 1000)
    program = export_program(weights, tmp_path / "model.onnx", batch=batch)
    names = ["model.onnx"] if batch is None else ["model.onnx", "model.onnx.data"]
    assert [path.name for path in program.files] == sorted(path.name for path in tmp_path.iterdir()) == names
    assert program.difference is not None
    assert program.difference <= TOLERANCE
    session: Any = onnxruntime.InferenceSession(str(program.path), providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()
    assert entry.name == "images"
    assert entry.shape[1:] == [3, 32, 48]
    assert (entry.shape[0] == 2) == (batch == 2)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["input_shape"])[0] == ("B" if batch is None else 2)
    own = load_model(weights)
    for size in (1, 4) if batch is None else (2,):
        images = torch.randn(size, 3, 32, 48)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            assert torch.allclose(found, own(images), atol=1e-4)


def test_without_onnx_s_packages_the_error_says_what_to_install(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvit.export_program, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="format 'onnx' needs onnx, onnxscript, onnxruntime; pip install onnx"):
        export_program(run.run_dir, tmp_path / "model.onnx")


def test_a_program_that_answers_otherwise_is_not_there(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvit.export_program, "_torch_answer", lambda part: lambda x: torch.ones(len(x), 10))
    with pytest.raises(CheckpointError, match="differ from the run's by"):
        export_program(run.run_dir, tmp_path / "model.pt2", batch=1)
    assert list(tmp_path.iterdir()) == []


def test_a_detector_is_no_program(tmp_path: Path) -> None:
    model = {"num_classes": 2, "embed_dim": 16, "depths": (1, 1, 1, 1)}
    config = parse_config({"name": "det", "output_dir": str(tmp_path), "task": "detection", "model": model})
    write_checkpoint(config)
    with pytest.raises(ValueError, match="det is a detector, which is no program of fixed shape"):
        export_program(config.run_dir, tmp_path / "det.pt2")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["model.onnx", "--format", "torch.export"], "format 'torch.export' goes with .pt2, not with '.onnx'"),
        (["model.pt2", "--batch", "0"], "a fixed batch has at least one input"),
        (["model.safetensors", "--batch", "1"], "--batch 1: belongs to the formats onnx and torch.export"),
        (["there.pt2"], "exists already"),
        (["model.pt2", "--ema"], "holds no moving average"),
    ],
)
def test_what_cannot_be_exported_as_asked_is_refused(
    run: RunConfig, tmp_path: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.pt2").touch()
    assert main(["export", str(run.run_dir), str(tmp_path / words[0]), *words[1:]]) == 1
    assert error in capsys.readouterr().err


def test_the_command_tells_shape_and_difference(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.run_dir), str(tmp_path / "model.pt2"), "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path}/model.pt2: inputs 1x3x32x48, logits are the run's own within" in printed
