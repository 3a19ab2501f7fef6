"""Pictures with objects for tests: COCO data sets in a folder, and samples as they lie in a shard."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.annotations import AnnotatedPicture, Annotation, write_annotations
from data_pipeline.masks import encode, mask_box
from tests.data_pipeline.pictures import pixels

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "supercategory": "animal"}]


def blob(height: int, width: int, seed: int) -> np.ndarray:
    """Return a convex mask without thin parts, so that resizing keeps its extent: an ellipse (H, W)."""
    draws = np.random.default_rng(seed)
    radius_y, radius_x = draws.uniform(4, height / 3), draws.uniform(4, width / 3)
    centre_y, centre_x = draws.uniform(0, height), draws.uniform(0, width)
    y, x = np.mgrid[:height, :width] + 0.5
    mask = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 <= 1
    mask[int(min(centre_y, height - 1)), int(min(centre_x, width - 1))] = True
    return mask


def box_polygon(left: float, top: float, width: float, height: float) -> list[float]:
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def annotation(mask: np.ndarray, identity: int = 1, label: int = 0, *, is_crowd: bool = False) -> Annotation:
    """Return the object whose pixels a mask has."""
    box = mask_box(mask)
    assert box is not None
    bbox = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return Annotation(identity, label, bbox, is_crowd, float(mask.sum()), encode(mask))


def png(seed: int, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(
    annotations: list[Annotation], height: int = 60, width: int = 80, image_id: int = 1, seed: int = 0
) -> dict[str, bytes]:
    """Return the members of a packed picture."""
    record = AnnotatedPicture(image_id, f"{image_id}.png", height, width, tuple(annotations))
    return {"png": png(seed, height, width), "json": write_annotations(record)}


def scene(seed: int, number: int, height: int = 60, width: int = 80) -> dict[str, bytes]:
    """Return a picture with `number` ellipses of labels 0, 1, 0, …"""
    objects = [annotation(blob(height, width, 100 * seed + i), i + 1, i % 2) for i in range(number)]
    return sample(objects, height, width, image_id=seed + 1, seed=seed)


def coco_set(folder: Path, number: int = 3) -> tuple[Path, Path]:
    """Write a COCO data set: `number` pictures 80x60 with a polygon, an RLE and a crowd each; the last is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for place in range(number):
        (folder / f"p{place}.png").write_bytes(png(place, 60, 80))
        images.append({"id": 10 + place, "file_name": f"p{place}.png", "height": 60, "width": 80})
        if place == number - 1:
            continue
        first = 3 * place
        mask = np.zeros((60, 80), bool)
        mask[5:15, 6:20] = True
        crowd = np.zeros((60, 80), bool)
        crowd[:, 70:] = True
        runs = {"size": [60, 80], "counts": [70 * 60, 10 * 60]}
        parts: list[dict[str, Any]] = [
            {"bbox": [30.0, 20.5, 12.0, 8.0], "segmentation": [box_polygon(30, 20.5, 12, 8)], "category_id": 3},
            {"bbox": [6, 5, 14, 10], "segmentation": encode(mask), "category_id": 7, "area": 140},
            {"bbox": [70, 0, 10, 60], "segmentation": runs, "category_id": 7, "iscrowd": 1, "area": 600},
        ]
        annotations += [{"id": first + i + 1, "image_id": 10 + place, **part} for i, part in enumerate(parts)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return folder, path
