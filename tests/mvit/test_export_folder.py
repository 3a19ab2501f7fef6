"""A Hugging Face-style folder is loaded by timm without our code, with the run's logits and preprocessing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config  # pyright: ignore[reportPrivateImportUsage]

import mvit
from data_pipeline.image import ImageTransform
from launcher.cli import main
from mvit.config import RunConfig, parse_config
from mvit.export import export_weights
from mvit.export_folder import export_folder
from tests.data_pipeline.pictures import encoded
from tests.mvit.synthetic_checkpoint import untrained, write_checkpoint

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run of a published size with its own classes and resolution, at a crop that is nobody's default."""
    config = parse_config(
        {
            "name": "tiny",
            "output_dir": str(tmp_path_factory.mktemp("runs")),
            "model": {"variant": "mvitv2_tiny", "num_classes": 7},
            "image": {"image_size": (64, 64), "crop_pct": 0.8, "mean": (0.5, 0.4, 0.3)},
        }
    )
    write_checkpoint(config)
    return config


def test_timm_builds_the_run_s_model_from_the_folder_alone(tiny: RunConfig, tmp_path: Path) -> None:
    found = export_folder(tiny.run_dir, tmp_path / "folder", verify=False)
    assert found.timm == "mvitv2_tiny"
    assert sorted(path.name for path in found.path.iterdir()) == FILES
    theirs = timm.create_model(f"local-dir:{found.path}", pretrained=True).eval()
    ours = mvit.load_model(found.path)
    data = resolve_model_data_config(theirs)
    assert (data["input_size"], data["crop_pct"], tuple(data["mean"])) == ((3, 64, 64), 0.8, (0.5, 0.4, 0.3))
    picture = encoded(3, 90, 120)
    transform = create_transform(**data)
    inputs = transform(Image.open(io.BytesIO(picture)))[None]  # type: ignore[index]
    pixels, _ = ImageTransform(tiny.image, train=False).unlabelled(picture)
    own = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - torch.tensor(tiny.image.mean).view(3, 1, 1)) / (
        torch.tensor(tiny.image.std).view(3, 1, 1)
    )
    assert torch.allclose(inputs[0], own, atol=1e-5)
    with torch.no_grad():
        expected, logits = ours(own[None]), theirs(inputs)
    assert logits.shape == (1, 7)
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max().clamp(min=1)))
    said = json.loads((found.path / "preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 80}
    assert (said["crop_size"], said["do_center_crop"]) == ({"height": 64, "width": 64}, True)


def test_timm_loads_its_own_format_by_checkpoint_path(tiny: RunConfig, tmp_path: Path) -> None:
    file = export_weights(tiny.run_dir, tmp_path / "tiny.safetensors", format="timm", verify=False)
    theirs = timm.create_model("mvitv2_tiny", checkpoint_path=str(file), num_classes=7, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = mvit.load_model(file)(images)
        assert torch.allclose(theirs(images), expected, atol=1e-4 * float(expected.abs().max().clamp(min=1)))


def test_a_model_that_timm_has_not_keeps_our_names_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = untrained(tmp_path / "runs")
    out = tmp_path / "folder"
    assert main(["export", str(config.run_dir), str(out), "--format", "huggingface"]) == 0
    printed = capsys.readouterr().out
    assert "not for timm: timm builds the paper's sizes by name" in printed
    assert "tensors and logits are the run's own" in printed
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert mvit.load_model(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    described = json.loads((out / "config.json").read_text())
    assert described["num_labels"] == len(described["id2label"]) == 10
    assert parse_config(described["recipe"]) == config


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    config = untrained(tmp_path / "runs")
    out = tmp_path / "folder"
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds something already"):
        export_folder(config.run_dir, out, verify=False)
    export_folder(config.run_dir, out, overwrite=True, verify=False)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "mine.txt"])
    with pytest.raises(ValueError, match="is a file"):
        export_folder(config.run_dir, out / "mine.txt", verify=False)


def test_clips_are_refused(tmp_path: Path) -> None:
    config = parse_config({"name": "clips", "output_dir": str(tmp_path), "task": "video_classification"})
    small = {"num_classes": 3, "embed_dim": 16, "depths": (1, 1, 1, 1)}
    write_checkpoint(config := parse_config({**config.model_dump(mode="json"), "model": small}))
    with pytest.raises(ValueError, match="format 'huggingface' is for image classifiers"):
        export_folder(config.run_dir, tmp_path / "out")
