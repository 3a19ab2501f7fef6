"""What `mvit predict` says is what the model says, in the files' own pixels, and no file is passed over in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mvit
from data_pipeline.detection import DetectionTransform, collate_detections
from data_pipeline.image import ImageTransform, collate_images
from data_pipeline.pack_coco import pack_coco
from data_pipeline.reads import Item
from data_pipeline.video import VideoTransform, collate_videos
from launcher.cli import main
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.detection.detections import Detections
from mvit.detection.detector import Detector
from mvit.export import export_weights
from mvit.prediction import load_predictor, predict_files
from mvit.prediction_results import Classified, Detected, Unreadable
from mvit.tasks import create_task
from tests.data_pipeline.clips import clip
from tests.data_pipeline.pictures import encoded
from tests.data_pipeline.scenes import coco_set, sample
from tests.mvit.synthetic_checkpoint import DETECTOR, untrained, write_checkpoint

TINY = {"num_classes": 10, "embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with two pictures, one in a folder of its own, a broken one, and what is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encoded(1))
    (folder / "more" / "b.PNG").write_bytes(encoded(2, 90, 50, "PNG"))
    (folder / "more" / "broken.jpg").write_bytes(encoded(3)[:300])
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> RunConfig:
    """Return the config of a run of pictures that consists of one checkpoint of made-up weights."""
    return untrained(tmp_path, num_classes=10, depths=(1, 1, 1, 1))


@pytest.fixture
def detector(tmp_path: Path) -> RunConfig:
    """Return the config of a run of a detector of two classes, with the data it was trained on."""
    folder, annotations = coco_set(tmp_path / "coco")
    pack_coco({"train": (folder, annotations)}, tmp_path / "data")
    config = parse_config(
        {
            "name": "detector",
            "output_dir": str(tmp_path),
            "task": "detection",
            "model": TINY | {"num_classes": 2},
            "data": {"train": str(tmp_path / "data" / "train")},
            "detection": {"test_short_side": 64, "test_max_side": 128},
            "detector": DETECTOR,
        }
    )
    write_checkpoint(config)
    return config


def guessed(result: Any) -> dict[int, float]:
    assert isinstance(result, Classified)
    return {guess.label: guess.probability for guess in result.guesses}


# --- classes ------------------------------------------------------------------------------------------------------


def test_probabilities_of_a_picture_are_those_of_the_model(images: RunConfig, pictures: Path, tmp_path: Path) -> None:
    weights = export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False)
    (result,) = mvit.predict(pictures / "a.jpg", weights, topk=10)
    members = {"jpg": encoded(1), "cls": b"3"}
    batch = collate_images([Item(ImageTransform(images.image, train=False)(members, 0), 0, "a", 1.0)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (images.image.mean, images.image.std))
    with torch.no_grad():
        wanted = mvit.load_model(weights)((batch.images / 255 - mean) / std).softmax(dim=1)[0]
    probabilities = guessed(result)
    assert list(probabilities) == wanted.argsort(descending=True).tolist()
    assert [probabilities[label] for label in range(10)] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_probabilities_of_a_video_are_the_mean_over_all_its_test_views(tmp_path: Path) -> None:
    video = {"num_frames": 4, "image_size": (32, 32), "short_side": 32, "num_clips": 3, "num_crops": 2}
    config = parse_config(
        {
            "name": "clips",
            "output_dir": str(tmp_path),
            "task": "video_classification",
            "model": TINY,
            "video": video | {"frame_stride": 2},
        }
    )
    write_checkpoint(config)
    weights = export_weights(config.run_dir, tmp_path / "w.safetensors", verify=False)
    data = clip()
    (tmp_path / "a.mp4").write_bytes(data)
    (result,) = mvit.predict([tmp_path / "a.mp4"], weights, topk=10)
    example = VideoTransform(config.video, train=False)({"mp4": data, "cls": b"0"}, 0)
    clips = collate_videos([Item(example, 0, "a", 1.0)]).clips[0]
    assert len(clips) == 6
    with torch.no_grad():
        wanted = mvit.load_model(weights)((clips / 255 - 0.45) / 0.225).softmax(dim=1).mean(dim=0)
    assert [guessed(result)[label] for label in range(10)] == pytest.approx(wanted.tolist(), abs=1e-6)

    (one,) = mvit.predict([tmp_path / "a.mp4"], weights, overrides=["video.num_clips=1", "video.num_crops=1"])
    assert guessed(one) != pytest.approx(guessed(result), abs=1e-6)


def test_a_run_a_checkpoint_and_a_bare_file_with_its_recipe_say_the_same(
    images: RunConfig, pictures: Path, tmp_path: Path
) -> None:
    exported = export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False)
    bare = export_weights(images.run_dir, tmp_path / "w.pyth", verify=False)
    (images.run_dir / "config.yaml").write_text(images.to_yaml())
    wanted = mvit.predict(pictures / "a.jpg", exported)
    (checkpoint,) = (images.run_dir / "checkpoints").glob("step_*")
    for weights in (images.run_dir, checkpoint):
        assert mvit.predict(pictures / "a.jpg", weights) == wanted
    assert mvit.predict(pictures / "a.jpg", bare, config=images) == wanted
    with pytest.raises(ValueError, match=r"w\.pyth: not a \.safetensors file .* --recipe"):
        mvit.predict(pictures / "a.jpg", bare)


def test_classes_are_called_as_in_the_training_data_or_as_told(
    detector: RunConfig, images: RunConfig, pictures: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {number}\n" for number in range(10)))
    weights = export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False)

    def called(overrides: tuple[str, ...] = (), names: Path | None = None) -> tuple[str, str]:
        predictor = load_predictor(weights, None, overrides, names=names)
        (result,) = predict_files(predictor, pictures / "a.jpg", topk=1)
        assert isinstance(result, Classified)
        (best,) = result.guesses
        return best.name.replace(str(best.label), "N"), predictor.names.origin

    assert called() == ("N", "numbers, since the recipe names no training data; --names FILE names them")
    assert f"{detector.data.train} has 2 classes, the model 10;" in called((f"data.train={detector.data.train}",))[1]
    assert load_predictor(detector.run_dir / "checkpoints" / "step_00000001").names.names == ("dog", "cat")
    assert called(names=names) == ("class N", str(names))
    missing = called(("data.train=nowhere",))[1]
    assert "nowhere is no packed folder here" in missing
    names.write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match="has 2 class names, the model has 10 classes"):
        called(names=names)


# --- objects ------------------------------------------------------------------------------------------------------


def test_objects_are_those_of_the_detector_in_the_picture_s_own_pixels(detector: RunConfig, tmp_path: Path) -> None:
    picture = tmp_path / "coco" / "p0.png"
    (result,) = mvit.predict(picture, detector.run_dir / "checkpoints" / "step_00000001", score=0.0)
    assert isinstance(result, Detected)
    assert (result.size, result.drawn) == ((60, 80), None)

    members = sample([]) | {"png": picture.read_bytes()}
    example = DetectionTransform(detector.detection, train=False)(members, 0)
    batch = collate_detections([Item(example, 0, "a", 1.0)], detector.detection)
    predictor = load_predictor(export_weights(detector.run_dir, tmp_path / "w.safetensors", verify=False))
    with torch.no_grad():
        (wanted,) = create_task(detector).predict(predictor.model, batch, dtype=torch.float32)
    wanted = wanted.resized((60, 80))
    assert len(wanted) == len(result.objects) > 0
    assert torch.allclose(torch.tensor([found.box for found in result.objects]), wanted.boxes)
    assert [found.score for found in result.objects] == pytest.approx(wanted.scores.tolist())
    assert {(found.label, found.name, found.category_id) for found in result.objects} <= {(0, "dog", 3), (1, "cat", 7)}


def test_what_is_found_is_drawn_where_it_is_and_written_for_coco(
    detector: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector's answer is set by hand: two objects, sure and less so, in pixels of the resized picture."""

    def detect(self: Detector, images: Any, sizes: Any) -> list[Detections]:
        assert sizes.tolist() == [[64, 85]]
        scale = torch.tensor([85 / 80, 64 / 60] * 2)
        boxes = torch.tensor([[10.0, 20.0, 40.0, 50.0], [50.0, 5.0, 70.0, 15.0]]) * scale
        masks = torch.ones(2, 28, 28)
        return [Detections(boxes, torch.tensor([1, 0]), torch.tensor([0.9, 0.4]), masks, (64, 85))]

    monkeypatch.setattr(Detector, "detect", detect)
    picture, out = tmp_path / "coco" / "p0.png", tmp_path / "out"
    predictor = load_predictor(detector.run_dir / "checkpoints" / "step_00000001")
    (result,) = predict_files(predictor, [picture], out=out)
    assert isinstance(result, Detected)
    (found,) = result.objects
    assert found.box == pytest.approx((10, 20, 40, 50), abs=1e-4)
    (row,) = json.loads((out / "predictions.json").read_text())
    assert row["bbox"] == pytest.approx([10, 20, 30, 30], abs=1e-4)
    assert (row["image_id"], row["category_id"], row["name"], row["file_name"]) == (1, 7, "cat", str(picture))
    from faster_coco_eval.core import mask as rle_code

    mask = np.zeros((60, 80), bool)
    mask[20:50, 10:40] = True
    assert (rle_code.decode(row["segmentation"]).astype(bool) == mask).mean() > 0.97

    assert result.drawn == out / "p0.png"
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (picture, out / "p0.png"))
    assert after.shape == before.shape
    changed = np.abs(after - before).max(axis=2) > 0
    assert changed[21:49, 11:39].mean() > 0.95  # the mask
    assert np.unique(after[20, 15:40], axis=0).shape == (1, 3)  # the box's upper edge, of one colour
    assert not changed[:, 62:].any()  # the less sure one is not drawn
    assert not changed[51:].any()

    both = predict_files(predictor, [picture, picture], out=out, score=0.3, overwrite=True)
    assert [len(each.objects) for each in both if isinstance(each, Detected)] == [2, 2]
    assert {path.name for path in out.iterdir()} == {"p0.png", "p0-2.png", "predictions.json"}


def test_a_copy_never_replaces_a_picture(detector: RunConfig, tmp_path: Path) -> None:
    picture = tmp_path / "coco" / "p0.png"
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="would be replaced by its copy"):
        mvit.predict(picture, detector.run_dir / "checkpoints" / "step_00000001", out=picture.parent)
    assert picture.read_bytes() == before


def test_a_file_that_is_there_is_replaced_only_if_allowed(
    detector: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(export_weights(detector.run_dir, tmp_path / "w.safetensors", verify=False))
    picture, out = tmp_path / "coco" / "p0.png", tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text("mine")
    command = ["predict", str(picture), "--weights", weights, "--out", str(out)]
    assert main(command) == 1
    assert f"{out / 'predictions.json'} would be replaced" in capsys.readouterr().err
    assert [path.read_text() for path in out.iterdir()] == ["mine"]
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((out / "predictions.json").read_text()) != "mine"
    (out / "p0.png").unlink()
    (out / "p0.png").mkdir()
    assert main([*command, "--overwrite"]) == 1
    assert "a folder is where a file is to be written" in capsys.readouterr().err


def test_a_copy_that_cannot_be_written_costs_no_result(
    detector: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(export_weights(detector.run_dir, tmp_path / "w.safetensors", verify=False))
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "a").mkdir(parents=True)
    for name in ("a/one.png", "two.png"):
        (folder / name).write_bytes((tmp_path / "coco" / "p0.png").read_bytes())
    out.mkdir()
    (out / "a").write_text("a file where the folder of a copy is to be")
    assert main(["predict", str(folder), "--weights", weights, "--out", str(out), "--score", "0"]) == 1
    told = capsys.readouterr()
    assert f"({out / 'a' / 'one.png'} could not be written: " in told.out
    assert "error: 1 of 2 could not be read or drawn" in told.err
    assert {row["image_id"] for row in json.loads((out / "predictions.json").read_text())} == {1, 2}
    assert (out / "two.png").is_file()


def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(pictures), "--weights", str(tmp_path / "there are none"), "--out"]
    assert main([*command, str(pictures / "a.jpg")]) == 1
    assert "is no folder that can be written" in capsys.readouterr().err


def test_links_that_lead_back_are_followed_once(images: RunConfig, pictures: Path, tmp_path: Path) -> None:
    weights = export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False)
    (pictures / "more" / "back").symlink_to(pictures, target_is_directory=True)
    (pictures / "again").symlink_to(pictures / "more", target_is_directory=True)
    results = mvit.predict(pictures, weights)
    assert sorted(result.path.name for result in results) == ["a.jpg", "b.PNG", "broken.jpg"]


def test_weights_of_a_backbone_alone_find_nothing_and_are_refused(
    detector: RunConfig, images: RunConfig, pictures: Path, tmp_path: Path
) -> None:
    backbone = export_weights(images.run_dir, tmp_path / "w.pth", verify=False)
    with pytest.raises(ConfigError, match="weights of a backbone, not of a whole detector"):
        mvit.predict(pictures / "a.jpg", backbone, config=detector)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    images: RunConfig, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False))
    (tmp_path / "empty").mkdir()
    missing, empty, out = tmp_path / "missing.jpg", tmp_path / "empty", tmp_path / "out"
    asked = [str(path) for path in (pictures, missing, empty)]
    results = mvit.predict(asked, weights)
    assert [result.path.name for result in results] == ["a.jpg", "b.PNG", "broken.jpg", "missing.jpg", "empty"]
    assert [type(result) for result in results] == [Classified, Classified, Unreadable, Unreadable, Unreadable]

    assert main(["predict", *asked, "--weights", weights, "--topk", "2", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert f"{pictures / 'a.jpg'}: " in told.out
    assert "error: 3 of 5 could not be read or drawn" in told.err
    assert f"{missing}: No such file or directory" in told.out
    assert f"{empty}: the folder holds no picture" in told.out
    assert [len(row["classes"]) for row in json.loads((out / "predictions.json").read_text())] == [2, 2]

    assert main(["predict", *asked, "--weights", weights, "--json"]) == 1
    told = capsys.readouterr()
    assert f"{missing}: No such file or directory" in told.err
    printed = json.loads(told.out)
    assert [("error" in row, len(row.get("classes", ()))) for row in printed["results"]] == [
        *[(False, 5)] * 2,
        *[(True, 0)] * 3,
    ]
    assert main(["predict", str(pictures / "a.jpg"), "--weights", weights]) == 0


def test_settings_may_stand_among_the_files_and_reach_the_recipe(
    images: RunConfig, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, recipe = export_weights(images.run_dir, tmp_path / "w.pyth", verify=False), tmp_path / "recipe.yaml"
    recipe.write_text(images.to_yaml())
    picture = pictures / "x=1.jpg"  # a file, though it looks like a setting
    picture.write_bytes(encoded(1))

    def best(*words: str) -> float:
        command = ["predict", str(picture), *words, "--weights", str(weights), "--recipe", str(recipe), "--json"]
        assert main([*command, "image.interpolation=bicubic"]) == 0
        return json.loads(capsys.readouterr().out)["results"][0]["classes"][0]["probability"]

    assert best("image.crop_pct=0.3") != pytest.approx(best(), abs=1e-9)


def test_bad_options_are_refused_before_any_file_is_read(images: RunConfig, pictures: Path, tmp_path: Path) -> None:
    weights = export_weights(images.run_dir, tmp_path / "w.safetensors", verify=False)
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used: .* choose cpu, cuda or cuda:N"):
        mvit.predict(pictures, weights, device="gpu")
    for options in ({"topk": 0}, {"score": 1.5}):
        with pytest.raises(ValueError, match="topk is 1 or more, score a probability"):
            mvit.predict(pictures, weights, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="unknown key"):
        mvit.predict(pictures, weights, overrides=["image.crop_pkt=0.5"])
    with pytest.raises(ValueError, match="no file is named"):
        mvit.predict([], weights)
