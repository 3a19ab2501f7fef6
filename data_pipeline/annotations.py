"""The objects of one picture: the json member of a detection sample, the rules it must keep, and its statistics."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.decode import IMAGE_EXTENSIONS, LABEL_EXTENSION, DecodeError
from data_pipeline.masks import Segmentation, is_number, mask_area, mask_problem
from data_pipeline.shard_index import IndexHead

ANNOTATIONS_EXTENSION = "json"
"""The member that holds a picture's objects."""

DETECTION_MEMBERS: tuple[tuple[str, ...], ...] = (IMAGE_EXTENSIONS, (ANNOTATIONS_EXTENSION,))
"""What every sample of a shard of annotated pictures must have, one of each group."""

ROUNDING = 1.0
"""Pixels by which a box may leave the picture: annotations are rounded. Decoding cuts it off."""

_SMALL, _MEDIUM = 32**2, 96**2  # COCO's limits of area
_PER_IMAGE = ((0, 0, "0"), (1, 1, "1"), (2, 5, "2 to 5"), (6, 10, "6 to 10"), (11, 30, "11 to 30"), (31, None, "more"))


@dataclass(frozen=True)
class Annotation:
    """One object, or one region of a crowd."""

    id: int
    label: int
    """Class number, from 0; the manifest's `categories` has the category that it stands for."""
    bbox: tuple[float, float, float, float]
    """Left, top, width, height, as in the source."""
    is_crowd: bool
    area: float
    """Of the source; where it says none, of the mask or else the box."""
    segmentation: Segmentation | None


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture's facts and its objects, without the pixels."""

    image_id: int
    file_name: str
    height: int
    width: int
    annotations: tuple[Annotation, ...]

    def boxes(self) -> np.ndarray:
        """Return the boxes (N, 4) float32, XYXY in pixels, cut at the picture's edges."""
        found = np.array([a.bbox for a in self.annotations], np.float64).reshape(-1, 4)
        found[:, 2:] += found[:, :2]
        return found.clip(0, (self.width, self.height) * 2).astype(np.float32)


def write_annotations(picture: AnnotatedPicture) -> bytes:
    """Return the json member of a sample."""
    objects = [
        {
            "id": a.id,
            "label": a.label,
            "bbox": a.bbox,
            "iscrowd": int(a.is_crowd),
            "area": a.area,
            "segmentation": a.segmentation,
        }
        for a in picture.annotations
    ]
    facts = {"image_id": picture.image_id, "file_name": picture.file_name, "size": [picture.height, picture.width]}
    return json.dumps({**facts, "annotations": objects}, separators=(",", ":")).encode()


def read_annotations(members: Mapping[str, bytes]) -> AnnotatedPicture:
    """Read the json member of a sample. Raises DecodeError if it is missing or is something else."""
    text = members.get(ANNOTATIONS_EXTENSION)
    if text is None:
        raise DecodeError(f"no .{ANNOTATIONS_EXTENSION} among the members {sorted(members)}")
    try:
        content = json.loads(text)
        objects = tuple(
            Annotation(
                _id(a["id"]),
                int(a["label"]),
                (float(a["bbox"][0]), float(a["bbox"][1]), float(a["bbox"][2]), float(a["bbox"][3])),
                bool(a.get("iscrowd", 0)),
                float(a["area"]),
                a.get("segmentation"),
            )
            for a in content["annotations"]
        )
        height, width = content["size"]
        return AnnotatedPicture(_id(content["image_id"]), str(content["file_name"]), int(height), int(width), objects)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DecodeError(f"the .{ANNOTATIONS_EXTENSION} member is no list of objects: {error!r}") from error


def holds_annotations(head: IndexHead) -> bool:
    """Whether a shard's samples are annotated pictures, by their members."""
    found = set(head.extensions)
    return ANNOTATIONS_EXTENSION in found and LABEL_EXTENSION not in found and not found.isdisjoint(IMAGE_EXTENSIONS)


# --- rules ------------------------------------------------------------------------------------------------------


def object_problem(bbox: Any, segmentation: Any, height: int, width: int) -> str | None:
    """Return what is wrong with an object of a picture of this size, naming value and rule; None if nothing is."""
    if not isinstance(bbox, Sequence) or len(bbox) != 4 or not all(is_number(value) for value in bbox):
        return f"bbox {bbox!r}: it must be four finite numbers x, y, width, height"
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        return f"bbox {list(bbox)} has no area: width and height must be above 0"
    right, bottom = x + box_width, y + box_height
    if min(x, y) < -ROUNDING or right > width + ROUNDING or bottom > height + ROUNDING:
        return f"bbox {list(bbox)} leaves the picture of {width}x{height} by more than {ROUNDING:g} pixel"
    if min(right, width) <= max(x, 0) or min(bottom, height) <= max(y, 0):
        return f"bbox {list(bbox)} lies outside the picture of {width}x{height}"
    return None if segmentation is None else mask_problem(segmentation, height, width)


def picture_problems(picture: AnnotatedPicture, num_classes: int | None) -> list[str]:
    """Return what is wrong with the objects of a packed sample, one line for each object with a problem."""
    problems = []
    seen: set[int] = set()
    for a in picture.annotations:
        problem = object_problem(a.bbox, a.segmentation, picture.height, picture.width)
        if a.label < 0 or (num_classes is not None and a.label >= num_classes):
            problem = f"label {a.label}, allowed: 0 to {num_classes - 1 if num_classes else '…'}"
        elif a.id in seen:
            problem = "its id occurs more than once"
        seen.add(a.id)
        if problem:
            problems.append(f"annotation {a.id} of image {picture.image_id} ({picture.file_name}): {problem}")
    return problems


def object_area(area: Any, bbox: Sequence[float], segmentation: Segmentation | None, height: int, width: int) -> float:
    """Return the area to keep of an object: what the source says, or else the mask's, or else the box's."""
    if is_number(area) and area > 0:
        return area
    return float(bbox[2] * bbox[3] if segmentation is None else mask_area(segmentation, height, width))


def _id(value: Any) -> int:
    if not is_id(number := int(value)):
        raise ValueError(f"id {number} is beyond 64 bits")
    return number


def is_id(number: int) -> bool:
    """Tell whether a number can be an id: a batch holds them as 64-bit integers."""
    return -(1 << 63) <= number < 1 << 63


# --- statistics: sums over pictures, so that they can be added up in any order -----------------------------------


def object_measures(picture: AnnotatedPicture) -> dict[str, float]:
    """Return what is summed over a set: objects, crowds, COCO's size classes, kinds of mask, pictures by objects."""
    objects = [a for a in picture.annotations if not a.is_crowd]
    number = len(objects)
    place = next(name for least, most, name in _PER_IMAGE if number >= least and (most is None or number <= most))
    masks = [a.segmentation for a in picture.annotations]
    return {
        "objects": float(number),
        "crowds": float(len(picture.annotations) - number),
        "small": float(sum(a.area < _SMALL for a in objects)),
        "medium": float(sum(_SMALL <= a.area < _MEDIUM for a in objects)),
        "large": float(sum(a.area >= _MEDIUM for a in objects)),
        "rle_masks": float(sum(isinstance(mask, dict) for mask in masks)),
        "polygon_masks": float(sum(isinstance(mask, list) for mask in masks)),
        "without_mask": float(sum(mask is None for mask in masks)),
        "pictures": 1.0,
        f"pictures with objects: {place}": 1.0,
    }


def describe_objects(measured: Mapping[str, float], counts: Mapping[str, int]) -> list[str]:
    """Tell the sums of `object_measures`, and the objects and crowds of each class, in words."""
    m = {name: round(value) for name, value in measured.items()}
    regions = m["objects"] + m["crowds"]
    per_picture = ", ".join(f"{name}: {m.get(f'pictures with objects: {name}', 0)}" for *_, name in _PER_IMAGE)
    return [
        f"{m['objects']} objects, {m['objects'] / m['pictures']:.1f} a picture; pictures by objects: {per_picture}",
        f"small (below 32² pixels) {m['small']}, medium {m['medium']}, large (96² or more) {m['large']}",
        f"{m['crowds']} crowd regions ({m['crowds'] / max(regions, 1):.1%}); masks: {m['rle_masks']} RLE, "
        f"{m['polygon_masks']} polygons, {m['without_mask']} none"
        + ("; training with masks refuses the pictures of the last" if m["without_mask"] else ""),
        *_by_class(counts),
    ]


def _by_class(counts: Mapping[str, int]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    if len(ranked) > 20:  # what is rare, and what is not; all are in the manifest
        shown = [*ranked[:10], ("…", 0), *ranked[-5:]]
        text = ", ".join(name if name == "…" else f"{name} {number}" for name, number in shown)
        return [f"of {len(ranked)} categories: {text}"]
    return ["by category: " + ", ".join(f"{name} {number}" for name, number in ranked)]
