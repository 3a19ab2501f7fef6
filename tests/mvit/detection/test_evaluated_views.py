"""The test of several sizes and mirrored, as typed: alike in any batch, and exact when mapped back."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.batch import DetectionBatch
from data_pipeline.reads import Item
from launcher.cli import main
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.detection.detections import Detections, flip_boxes
from mvit.detection.detector import Detector
from mvit.detection.multi_scale import View, detect_in_views
from mvit.tasks import create_task
from tests.data_pipeline.pictures import pixels, write_shards
from tests.data_pipeline.scenes import scene
from tests.mvit.synthetic_checkpoint import DETECTOR, write_checkpoint

SIZES = ((60, 80), (80, 60), (64, 64), (50, 90), (61, 77))
SEVERAL = {"test_short_sides": (48, 64, 80), "test_flip": True}


def detector_config(folder: Path, **sections: Any) -> RunConfig:
    """Return a recipe of a small detector that reports everything, with five pictures to evaluate, each its size."""
    if not (folder / "shards").exists():
        write_shards(folder / "shards", [scene(n, 1 + n % 3, *size) for n, size in enumerate(SIZES)], per_shard=3)
    tree: dict[str, Any] = {
        "name": "detector",
        "output_dir": str(folder),
        "task": "detection",
        "model": {"num_classes": 2, "embed_dim": 16, "depths": (1, 1, 1, 1)},
        "data": {"validation": str(folder / "shards"), "num_workers": 0},
        "detection": {"test_short_side": 64, "test_max_side": 128},
        "detector": DETECTOR,
        "train": {"precision": "fp32", "evaluation_batch_size": 2},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    return parse_config(tree)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Return the recipe, with a checkpoint of made-up weights in its run folder."""
    made = detector_config(tmp_path)
    write_checkpoint(made)
    return made


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def batch_of(config: RunConfig, *pictures: np.ndarray, all_views: bool = True) -> DetectionBatch:
    task = create_task(config)
    transform = task.transform(train=False, all_views=all_views)
    return task.collate([Item(transform.unlabelled(png(each)), -1, "", 1.0) for each in pictures])


def asked(config: RunConfig, *pictures: np.ndarray) -> list[Detections]:
    """Return what a detector of made-up weights finds in pictures that are one batch."""
    task = create_task(config)
    torch.manual_seed(0)
    model = task.build_model().eval()
    with torch.no_grad():
        return task.predict(model, batch_of(config, *pictures), dtype=torch.float32)


def assert_same(found: Detections, wanted: Detections, tolerance: float = 0.0) -> None:
    assert found.size == wanted.size
    assert found.labels.tolist() == wanted.labels.tolist()
    for one, other in ((found.boxes, wanted.boxes), (found.scores, wanted.scores), (found.masks, wanted.masks)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- views are mapped back ----------------------------------------------------------------------------------------


def test_one_size_that_is_the_plain_one_is_the_plain_test(config: RunConfig, tmp_path: Path) -> None:
    named = detector_config(tmp_path, detection={"test_short_sides": (64,)})
    assert batch_of(named, pixels(0)).all_views is None
    for found, wanted in zip(asked(named, pixels(0), pixels(1)), asked(config, pixels(0), pixels(1)), strict=True):
        assert_same(found, wanted)


def test_views_that_are_all_the_plain_one_find_what_it_finds(config: RunConfig) -> None:
    torch.manual_seed(0)
    detector = create_task(config).build_model().eval()
    assert isinstance(detector, Detector)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (plain,) = detector.detect(image, [(60, 90)])
    found = detect_in_views(detector, [View(image, (60, 90))] * 3, (60, 90))
    assert_same(found, plain, 1e-5)


def test_boxes_and_masks_of_a_mirrored_picture_are_the_mirrored_ones(config: RunConfig, tmp_path: Path) -> None:
    """Looked at as they are and mirrored, a picture and its mirror image show the same two views."""
    flipping = detector_config(tmp_path, detection={"test_short_side": 60, "test_flip": True})
    picture = pixels(3)  # 60 x 80: neither resized nor a multiple of 32
    found, (mirrored,) = asked(flipping, picture)[0], asked(flipping, picture[:, ::-1].copy())
    assert len(found) == 5
    assert found.masks is not None
    back = Detections(flip_boxes(mirrored.boxes, 80), mirrored.labels, mirrored.scores, flipped(mirrored), (60, 80))
    assert_same(found, back, 1e-4)
    (plain,) = asked(config, picture)
    assert not torch.equal(found.scores, plain.scores)


def flipped(found: Detections) -> Tensor:
    assert found.masks is not None
    return found.masks.flip(-1)


def test_what_is_found_in_several_views_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    several = detector_config(tmp_path, detection=SEVERAL)
    pictures = [pixels(n, *size) for n, size in enumerate(SIZES)]
    together = asked(several, *pictures)
    assert [found.size for found in together] == list(SIZES)
    for picture, found in zip(pictures, together, strict=True):
        assert_same(found, asked(several, picture)[0])


def test_the_long_side_grows_with_the_short_one_and_training_evaluates_plainly(tmp_path: Path) -> None:
    several = detector_config(tmp_path, detection=SEVERAL)
    picture = pixels(0, 40, 100)  # 128 at most at a short side of 64
    assert batch_of(several, picture).view_sizes == (((38, 96), (51, 128), (64, 160)),)
    views = batch_of(several, picture, picture).views
    assert [tuple(view.shape) for view in views[1]] == [(3, 38, 96), (3, 51, 128), (3, 64, 160)]
    assert torch.equal(views[0][1], views[1][1])
    in_training = batch_of(several, picture, all_views=False)
    assert in_training.views == ()
    assert in_training.sizes.tolist() == [[51, 128]]
    task = create_task(several)
    assert [task.evaluation_samples(n, all_views=True) for n in (1, 6, 64)] == [1, 1, 10]
    assert task.evaluation_samples(64) == 64


# --- the command --------------------------------------------------------------------------------------------------


def test_the_best_row_is_a_matter_of_the_command_line(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    words = ["evaluate", str(recipe), "--weights", str(config.run_dir / "checkpoints" / "step_00000001"), "--json"]
    settings = ["detection.test_short_sides=[48,64]", "detection.test_flip=true", "detector.soft_nms=linear"]
    with caplog.at_level(logging.INFO, logger="mvit"):
        assert main([*words, *settings]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["views"], figures["images"]) == (4, 5)
    assert "5 samples, 4 view(s) of each picture: short side 48, 64, as it is and mirrored" in caplog.text
    (picture,) = [tmp_path / "a.png"]
    picture.write_bytes(png(pixels(0)))

    def best(*extra: str) -> float:
        asked = [
            "predict",
            str(picture),
            "--weights",
            words[3],
            "--score",
            "0",
            "--overwrite",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*asked, "--json", *extra]) == 0
        return json.loads(capsys.readouterr().out)["results"][0]["objects"][0]["score"]

    assert best(*settings) != best()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_short_sides": (0, 64)}, r"test_short_sides \(0, 64\) must be in pixels above 0: \[600, 800, 1000\]"),
        ({"test_short_sides": (64, 48, 64)}, r"test_short_sides \(64, 48, 64\) names a size twice"),
        ({"test_short_sides": 800}, r"detection.test_short_sides = 800: input should be a valid tuple"),
        ({"test_flip": 2}, r"detection.test_flip = 2: input should be a valid boolean"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detector_config(tmp_path, detection=values)
