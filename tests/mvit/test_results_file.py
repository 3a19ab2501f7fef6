"""The file of `mvit evaluate --results`: what others read from it agrees with the figures we print."""

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mvit
from data_pipeline.batch import DetectionBatch
from data_pipeline.detection import DETECTION_MEMBERS, ground_truth
from data_pipeline.shards import open_shards
from launcher.cli import main
from mvit import distributed
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.detection.coco_metric import FIGURES
from mvit.detection.detections import Detections
from mvit.tasks import create_task
from mvit.tasks.detection import Detection
from tests.data_pipeline.scenes import coco_set
from tests.mvit.detection.test_evaluated_views import SEVERAL, SIZES, detector_config
from tests.mvit.synthetic_checkpoint import write_checkpoint
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed


def _noisy(self: Detection, model: Any, batch: DetectionBatch, **_: Any) -> list[Detections]:
    """Answer with the truth, a little off, some of it with the other class, and boxes on nothing: 0 < AP < 1."""
    found = []
    for boxes, labels, size, image in zip(batch.boxes, batch.labels, batch.sizes, batch.image_ids, strict=True):
        random = torch.Generator().manual_seed(int(image) + 1)
        near = boxes + torch.randn(boxes.shape, generator=random)
        far = torch.rand((2, 4), generator=random) * 20 + torch.tensor([0.0, 0.0, 22.0, 22.0])
        scores = torch.rand(len(boxes) + 2, generator=random).sort(descending=True).values
        wrong = torch.rand(len(labels), generator=random) < 0.1
        masks = torch.ones(len(scores), 28, 28)
        all_labels = torch.cat((torch.where(wrong, 1 - labels, labels), torch.zeros(2).long()))
        height, width = size.tolist()
        found.append(Detections(torch.cat((near, far)), all_labels, scores, masks, (height, width)))
    return found


def _by_pycocotools(truth: Path, results: Path, kind: str, hidden: str | None = None) -> list[float]:
    rows = [{key: value for key, value in row.items() if key != hidden} for row in json.loads(results.read_text())]
    alone = results.with_name(f"{kind}.json")
    alone.write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        evaluation = COCOeval(known, known.loadRes(str(alone)), kind)  # pyright: ignore[reportArgumentType]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


def test_pycocotools_reads_the_file_and_finds_the_figures_that_were_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = detector_config(tmp_path)
    write_checkpoint(config)
    monkeypatch.setattr(Detection, "predict", _noisy)
    recipe, results, truth = (tmp_path / name for name in ("recipe.yaml", "out/results.json", "truth.json"))
    recipe.write_text(config.to_yaml())
    words = ["--weights", str(config.run_dir / "checkpoints" / "step_00000001"), "--results", str(results)]
    words += ["--per-class", str(tmp_path / "classes.csv")]
    assert main(["evaluate", str(recipe), *words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0.1 < figures["mask_ap"] < figures["box_ap50"] < 1
    shards = open_shards(tmp_path / "shards", required=DETECTION_MEMBERS)
    truth.write_text(json.dumps({"info": {}} | ground_truth(shards, config.model.num_classes)))

    with open(tmp_path / "classes.csv") as file:
        table = list(csv.DictReader(file))
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50"):  # the figure is the mean of the categories that occur
        known = [float(row[name]) for row in table if row[name]]
        assert sum(known) / len(known) == pytest.approx(figures[name], abs=1e-4)
    assert [row["id"] for row in table] == ["1", "2"]
    assert sum(int(row["objects"]) for row in table) > 0

    box = _by_pycocotools(truth, results, "bbox")
    assert box == pytest.approx([figures[f"box_{name}"] for name in FIGURES], abs=1e-6)
    mask = _by_pycocotools(truth, results, "segm", hidden="bbox")
    expected = [figures[f"mask_{name}"] for name in FIGURES]
    assert mask == pytest.approx(expected, abs=1e-6)
    # As the file is, areas are those of the boxes, which only moves the figures by size
    as_it_is = dict(zip(FIGURES, _by_pycocotools(truth, results, "segm"), strict=True))
    by_size = ("_small", "_medium", "_large")
    for name, value in zip(FIGURES, expected, strict=True):
        assert name.endswith(by_size) or as_it_is[name] == pytest.approx(value, abs=1e-6)

    assert main(["evaluate", str(recipe), *words]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {results}" in printed
    assert "views: 1\n" in printed


def test_ids_are_those_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.pack_coco import pack_coco

    folder, annotations = coco_set(tmp_path / "coco")
    pack_coco({"validation": (folder, annotations)}, tmp_path / "data")
    config = detector_config(tmp_path, data={"validation": str(tmp_path / "data" / "validation")})
    monkeypatch.setattr(Detection, "predict", _noisy)
    state = create_task(config).build_model().state_dict()
    mvit.evaluate(config, state, results=tmp_path / "results.json", show_progress=False)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["image_id"] for row in rows} == {10, 11, 12}
    assert {row["category_id"] for row in rows} == {3, 7}


# --- over ranks: two processes serve all tests here -----------------------------------------------------------------

Jobs = list[tuple[dict[str, Any], dict[str, torch.Tensor], Path]]


def _evaluated(jobs: Jobs, suffix: str) -> list[dict[str, float]]:
    """Evaluate each (config, weights), with the results in its file."""
    return [
        mvit.evaluate(parse_config(tree), state, results=file.with_suffix(suffix), show_progress=False)
        for tree, state, file in jobs
    ]


@pytest.fixture(scope="module")
def jobs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Return a plain detection, two in several views by one and by four pictures at once, and a classification."""
    folder = tmp_path_factory.mktemp("jobs")
    several = [{"detection": SEVERAL, "train": {"evaluation_batch_size": size}} for size in (1, 24)]
    configs = [detector_config(folder, **sections) for sections in ({}, *several)]
    configs.append(tiny_config(digits, folder, train={"evaluation_batch_size": 64}))
    found: Jobs = []
    for name, config in zip(("plain", "several_1", "several_24", "classes"), configs, strict=True):
        torch.manual_seed(0)
        state = create_task(config).build_model().state_dict()
        found.append((config.model_dump(mode="json"), state, folder / name))
    return found


@pytest.fixture(scope="module")
def figures(jobs: Jobs) -> list[dict[str, float]]:
    """Evaluate on two ranks and in this process; return what the latter found, which the ranks found, too."""
    on_two = run_distributed(_evaluated, 2, jobs, ".two.json")
    was_there = dist.is_initialized()
    alone = _evaluated(jobs, ".json")
    if not was_there:
        distributed.shutdown()
    for rank in on_two:
        assert rank[:3] == alone[:3]
        assert rank[3] == pytest.approx(alone[3])
    return alone


def _rows(jobs: Jobs, number: int) -> Sequence[dict[str, Any]]:
    """Return the rows of a job's file, which are the same on two ranks."""
    file = jobs[number][2]
    rows = json.loads(file.with_suffix(".json").read_text())
    assert json.loads(file.with_suffix(".two.json").read_text()) == rows
    return rows


def test_each_picture_is_in_the_file_once_on_any_ranks(jobs: Jobs, figures: list[dict[str, float]]) -> None:
    assert [each["views"] for each in figures[:3]] == [1, 6, 6]
    for number in range(3):
        rows = _rows(jobs, number)
        assert [row["image_id"] for row in rows] == [image for image in range(1, 6) for _ in range(5)]
        assert {row["category_id"] for row in rows} <= {1, 2}
        assert all(row["segmentation"]["size"] == list(SIZES[row["image_id"] - 1]) for row in rows)


def test_several_views_give_the_same_figures_and_file_by_any_batch(jobs: Jobs, figures: list[dict[str, float]]) -> None:
    assert figures[1] == figures[2]
    assert _rows(jobs, 1) == _rows(jobs, 2) != _rows(jobs, 0)


def test_of_a_classifier_the_file_has_the_best_classes_of_each_sample_once(
    digits: Path, jobs: Jobs, figures: list[dict[str, float]]
) -> None:
    rows = _rows(jobs, 3)
    shards = open_shards(f"{digits}/validation")
    assert [row["sample"] for row in rows] == [shards.key(sample) for sample in range(len(shards))]
    assert [row["label"] for row in rows] == [shards.label(sample) for sample in range(len(shards))]
    best = [[guess["label"] for guess in row["classes"]] for row in rows]
    right = [row["label"] == labels[0] for row, labels in zip(rows, best, strict=True)]
    among = [row["label"] in labels for row, labels in zip(rows, best, strict=True)]
    assert sum(right) / len(rows) == pytest.approx(figures[3]["top1"])
    assert sum(among) / len(rows) == pytest.approx(figures[3]["top5"])
    first = rows[0]["classes"]
    assert len(first) == 5
    assert [guess["name"] for guess in first] == [str(guess["label"]) for guess in first]
    assert [guess["probability"] for guess in first] == sorted((g["probability"] for g in first), reverse=True)


def test_the_views_of_videos_are_told_in_clips_and_crops(tmp_path: Path) -> None:
    video = {"num_clips": 5, "num_crops": 3}
    tree = {"name": "clips", "output_dir": str(tmp_path), "task": "video_classification", "video": video}
    assert create_task(parse_config(tree)).test_views() == (15, "15 view(s) of each video: 5 clip(s) x 3 crop(s)")


# --- what cannot be written ---------------------------------------------------------------------------------------


@pytest.fixture
def classifier(digits: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(digits, tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("weights.safetensors", ConfigError, r"weights.safetensors: it is replaced .* must end in \.json"),
        ("folder.json", ConfigError, "folder.json"),
        ("file/results.json", OSError, "file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_weights_are_read(
    classifier: RunConfig, tmp_path: Path, name: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error, match=words):
        mvit.evaluate(classifier, tmp_path / "no_such_weights", results=tmp_path / name, show_progress=False)
