"""COCO's figures are pycocotools' own, whatever the ranks, and no image counts twice or not at all."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as reference_code
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from data_pipeline.batch import DetectionBatch
from mvit.detection.coco_metric import FIGURES, CocoMetric, coco_figures, encode_masks
from mvit.detection.detections import Detections

HEIGHT, WIDTH = 120, 150
CATEGORIES = [{"id": 3, "name": "three"}, {"id": 7, "name": "seven"}, {"id": 90, "name": "ninety"}]


def _box(random: np.random.Generator) -> list[float]:
    side = random.uniform(5, 110, 2) if random.random() < 0.4 else random.uniform(4, 40, 2)
    left, top = random.uniform(0, WIDTH - min(side[0], WIDTH - 2)), random.uniform(0, HEIGHT - min(side[1], HEIGHT - 2))
    return [left, top, min(side[0], WIDTH - left), min(side[1], HEIGHT - top)]


def _ellipse(box: list[float]) -> dict[str, Any]:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    left, top, width, height = box
    mask = ((x - left - width / 2) / width * 2) ** 2 + ((y - top - height / 2) / height * 2) ** 2 <= 1
    return encode_masks(mask[None])[0]


def random_set(seed: int, num_images: int = 24) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a truth with crowds and empty images, and detections near it, of tied scores, and false ones."""
    random = np.random.default_rng(seed)
    images = [{"id": 10 * (n + 1), "height": HEIGHT, "width": WIDTH} for n in range(num_images)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def detect(image: int, category: int, box: list[float]) -> None:
        score = round(float(random.random()), 1 if random.random() < 0.5 else 6)
        row = {"image_id": image, "category_id": category, "bbox": box, "score": score}
        results.append(row | {"segmentation": _ellipse(box)})

    for image in images:
        for _ in range(int(random.integers(0, 6)) if random.random() > 0.2 else 0):
            box, category = _box(random), int(random.choice([3, 7]))
            code = _ellipse(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "segmentation": code,
                    "iscrowd": int(random.random() < 0.15),
                    "area": float(reference_code.area(code)),
                }
            )
            for _ in range(int(random.integers(0, 3))):
                moved = [max(0.5, value + float(random.normal(0, 2))) for value in box]
                detect(image["id"], category if random.random() < 0.9 else 90, moved)
        for _ in range(int(random.integers(0, 3))):
            detect(image["id"], int(random.choice([3, 7, 90])), _box(random))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, results


def _reference(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
            known = COCO()
            known.dataset = json.loads(json.dumps({"info": {}, **truth}))
            known.createIndex()
            hidden = "segmentation" if kind == "box" else "bbox"
            found = known.loadRes([{k: v for k, v in row.items() if k != hidden} for row in results])
            evaluation = COCOeval(known, found, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures |= {f"{kind}_{name}": float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return figures


@pytest.mark.parametrize("seed", range(4))
def test_all_24_figures_agree_with_pycocotools(seed: int) -> None:
    truth, results = random_set(seed)
    assert any(row["iscrowd"] for row in truth["annotations"])
    figures, expected = coco_figures(truth, results), _reference(truth, results)
    assert len(expected) == 24
    assert 0.05 < expected["box_ap"] < 0.95
    assert figures == pytest.approx(expected, abs=1e-6)


def test_detections_are_scored_in_original_pixels_and_written_as_cocos_results(tmp_path: Path) -> None:
    """A square found at half the size, with a full mask, is the square: AP 1, and the file says the same."""
    square = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    square[:, 20:80, 30:110] = True
    annotation = {
        "id": 1,
        "image_id": 5,
        "category_id": 7,
        "bbox": [30.0, 20.0, 80.0, 60.0],
        "segmentation": encode_masks(square)[0],
        "iscrowd": 0,
        "area": 4800.0,
    }
    truth = {
        "images": [{"id": 5, "height": HEIGHT, "width": WIDTH}],
        "annotations": [annotation],
        "categories": CATEGORIES,
    }
    metric = CocoMetric(lambda: truth, results_file=tmp_path / "run" / "results.json")
    metric.update(
        [_found([[15, 10, 55, 40]], [1], [0.9], (HEIGHT // 2, WIDTH // 2)), _found([], [], [])], _batch([5, -1])
    )
    figures = metric.compute()
    assert figures["box_ap"] == figures["mask_ap"] == 1.0
    assert figures["mask_ap_small"] == -1.0
    assert figures["images"] == 1.0
    assert len(figures) == 25
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert row["category_id"] == 7
    assert row["bbox"] == [30.0, 20.0, 80.0, 60.0]
    wrong = reference_code.decode([row["segmentation"]])[:, :, 0] != square[0]
    assert wrong.sum() <= 4  # the corners: interpolated with what lies outside, they fall below one half


def test_without_masks_there_are_the_figures_of_boxes_alone() -> None:
    truth, _ = random_set(0, num_images=2)
    metric = CocoMetric(lambda: truth)
    for image in truth["images"]:
        found = _found([[1, 1, 9, 9]], [0], [0.5])
        metric.add(Detections(found.boxes, found.labels, found.scores, None, found.size), image["id"], (HEIGHT, WIDTH))
    figures = metric.compute()
    assert "box_ap" in figures
    assert not any(name.startswith("mask") for name in figures)


def test_finding_nothing_at_all_is_an_ap_of_zero() -> None:
    truth, _ = random_set(0)
    metric = CocoMetric(lambda: truth)
    for image in truth["images"]:
        metric.add(_found([], [], []), image["id"], (HEIGHT, WIDTH))
    figures = metric.compute()
    assert figures["box_ap"] == figures["mask_ap"] == 0.0


def _found(
    boxes: list[Any], labels: list[int], scores: list[float], size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Detections:
    masks = torch.ones(len(boxes), 28, 28)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels).long(),
        torch.tensor(scores),
        masks,
        size,
    )


def _batch(image_ids: list[int]) -> DetectionBatch:
    count = len(image_ids)
    ids = torch.tensor(image_ids)
    none: Tensor = torch.zeros(0, dtype=torch.int64)
    return DetectionBatch(
        images=torch.zeros(count, 3, 4, 4, dtype=torch.uint8),
        sizes=torch.tensor([[4, 4]] * count),
        original_sizes=torch.tensor([[HEIGHT, WIDTH]] * count),
        image_ids=ids,
        weights=(ids >= 0).float(),
        sample_ids=ids,
        keys=("",) * count,
        num_objects=(0,) * count,
        all_boxes=torch.zeros(0, 4),
        all_labels=none,
        all_is_crowd=none.bool(),
        all_masks=None,
    )


def share(
    truth: dict[str, Any], results: list[dict[str, Any]], image_ids: list[int], max_missing: int
) -> dict[str, float]:
    """Evaluate these images; the detections are given as boxes, with full masks."""
    labels = {category["id"]: label for label, category in enumerate(CATEGORIES)}
    metric = CocoMetric(lambda: truth, max_missing)
    for image_id in image_ids:
        rows = [row for row in results if row["image_id"] == image_id]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        found = _found(boxes, [labels[row["category_id"]] for row in rows], [row["score"] for row in rows])
        metric.add(found, image_id, (HEIGHT, WIDTH))
    return metric.compute()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids + ids[:1], "1 images were seen more than once, image 10 among them"),
        (lambda ids: ids[2:], "2 of 4 images were not seen, image 10 among them; 1 may be missing"),
        (lambda ids: [*ids, 11], "1 images are not in the truth, image 11 among them"),
    ],
)
def test_images_seen_twice_or_never_or_unknown_are_refused(change: Any, words: str) -> None:
    truth, results = random_set(0, num_images=4)
    with pytest.raises(RuntimeError, match=words):
        share(truth, results, change([10, 20, 30, 40]), 1)


def test_images_that_may_be_missing_are_not_measured() -> None:
    truth, results = random_set(1, num_images=12)
    seen = [image["id"] for image in truth["images"]][1:]
    figures = share(truth, results, seen, 1)
    less = {
        "images": truth["images"][1:],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in seen],
        "categories": CATEGORIES,
    }
    assert figures == share(less, results, seen, 0)
    assert figures["images"] == 11.0
