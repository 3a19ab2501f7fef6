"""COCO's metric: box AP and mask AP with all twelve figures each, every image exactly once over all ranks."""

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_code
from torch import Tensor

from mvit.detection.detections import Detections
from mvit.distributed import broadcast_object

# In the order of COCOeval's summary. -1 where it is undefined: no object of that size in the whole set.
FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
Kind = Literal["box", "mask"]
Rle = dict[str, Any]
"""COCO's run-length code of a mask: {"size": [H, W], "counts": str}."""


@dataclass(frozen=True)
class ImageTruth:
    """What is annotated in one image, in its original pixels; all sequences have one entry per object.

    boxes: XYXY. labels: from 0. masks: run-length codes. is_crowd: regions of many objects, which the metric ignores.
    areas: in pixels, of the masks as annotated; they decide what is small, medium and large. None: counted from masks.
    """

    image_id: int
    size: tuple[int, int]
    """Height and width."""
    boxes: Sequence[Sequence[float]]
    labels: Sequence[int]
    masks: Sequence[Rle]
    is_crowd: Sequence[bool]
    areas: Sequence[float] | None = None


class CocoMetric:
    """Collects detections beside the truth, then computes AP and AR on rank 0.

    Args:
        category_ids: COCO's id of each label, `category_ids[label]`.
        image_ids: those that must have been seen once, over all ranks together; None does not ask for any.
        max_missing: so many of them may be missing, undecodable images as `data.max_bad_samples` allows.
        results_file: rank 0 writes the detections there, in COCO's results format.
    """

    def __init__(
        self,
        category_ids: Sequence[int],
        image_ids: Collection[int] | None = None,
        max_missing: int = 0,
        results_file: str | Path | None = None,
    ) -> None:
        repeated = [str(each) for each, count in Counter(category_ids).items() if count > 1]
        if repeated:
            raise ValueError(
                f"category_ids has {', '.join(repeated)} more than once; each label needs an id of its own"
            )
        self._category_ids = [int(each) for each in category_ids]
        self._expected = None if image_ids is None else {int(each) for each in image_ids}
        self._max_missing = max_missing
        self._results_file = None if results_file is None else Path(results_file)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def add(self, found: Detections, truth: ImageTruth) -> None:
        """Add one image; detections of another size are resized to the original's, their masks pasted there."""
        found = found if found.size == truth.size else found.resized(truth.size)
        image_id, (height, width) = int(truth.image_id), truth.size
        self._images.append({"id": image_id, "height": height, "width": width})
        self._annotations += self._truth_rows(truth)
        codes = encode_masks(found.pasted().cpu())
        rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), codes, strict=True)
        self._results += [
            {
                "image_id": image_id,
                "category_id": self._category_ids[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": code,
            }
            for (left, top, right, bottom), label, score, code in rows
        ]

    def compute(self) -> dict[str, float]:
        """Return box_ap, box_ap50, … mask_ar_large, and the number of images, over all ranks (collective).

        Fractions; -1 where there is nothing to measure. Raises RuntimeError on every rank if an image was seen twice,
        or not at all, or was not expected.
        """
        # As bytes: rank 0 alone takes them apart. Compressed masks of 5,000 images are about 50 MB in all.
        share = json.dumps([self._images, self._annotations, self._results]).encode()
        shares = _gather_on_main(share)
        answer: tuple[dict[str, float] | None, str | None] = (None, None)
        if shares is not None:
            try:
                answer = (self._evaluate(shares), None)
            except Exception as error:  # the other ranks wait for the answer
                answer = (None, f"{type(error).__name__}: {error}")
        if dist.is_initialized() and dist.get_world_size() > 1:
            answer = broadcast_object(answer)
        figures, problem = answer
        if figures is None:
            raise RuntimeError(f"COCO evaluation failed on rank 0: {problem}")
        return figures

    def _truth_rows(self, truth: ImageTruth) -> list[dict[str, Any]]:
        areas = truth.areas
        if areas is None:
            areas = [float(area) for area in rle_code.area(list(truth.masks))] if truth.masks else []
        rows = zip(truth.boxes, truth.labels, truth.masks, truth.is_crowd, areas, strict=True)
        return [
            {
                "image_id": int(truth.image_id),
                "category_id": self._category_ids[int(label)],
                "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
                "segmentation": _as_text(code),
                "iscrowd": int(crowd),
                "area": float(area),
            }
            for (left, top, right, bottom), label, code, crowd, area in rows
        ]

    def _evaluate(self, shares: Sequence[bytes]) -> dict[str, float]:
        images, annotations, results = ([row for part in parts for row in part] for parts in _unpack(shares))
        self._check_images(Counter(image["id"] for image in images))
        # The same order on any number of ranks: the figures of tied scores depend on it
        for rows in (annotations, results):
            rows.sort(key=lambda row: row["image_id"])
        if self._results_file is not None:
            part = self._results_file.with_suffix(f".{os.getpid()}.tmp")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(results))
            part.replace(self._results_file)
        figures = coco_figures(images, annotations, results, self._category_ids)
        return figures | {"images": float(len(images))}

    def _check_images(self, seen: Counter[int]) -> None:
        repeated = sorted(image for image, count in seen.items() if count > 1)
        if repeated:
            raise ValueError(f"{len(repeated)} images were seen more than once, image {repeated[0]} among them")
        if self._expected is None:
            return
        missing, unknown = sorted(self._expected - seen.keys()), sorted(seen.keys() - self._expected)
        if unknown:
            raise ValueError(f"{len(unknown)} images are not in the set, image {unknown[0]} among them")
        if len(missing) > self._max_missing:
            raise ValueError(
                f"{len(missing)} of {len(self._expected)} images were not seen, image {missing[0]} among them; "
                f"{self._max_missing} may be missing"
            )


def coco_figures(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> dict[str, float]:
    """Return the twelve figures of boxes and of masks, box_ap … mask_ar_large, by COCOeval (faster-coco-eval).

    images: id, height, width. annotations, results: as in COCO's files, boxes XYWH and run-length-coded masks.
    """
    truth = COCO(
        {
            "info": {},
            "images": [dict(image) for image in images],
            "categories": [{"id": category, "name": str(category)} for category in category_ids],
            "annotations": [dict(row, id=index) for index, row in enumerate(annotations, start=1)],
        }
    )
    figures: dict[str, float] = {}
    kinds: tuple[tuple[Kind, str], ...] = (("box", "bbox"), ("mask", "segm"))
    for kind, iou_type in kinds:
        if iou_type == "bbox":  # with a mask in it, a result's area would be the mask's, not the box's
            rows = [{key: value for key, value in row.items() if key != "segmentation"} for row in results]
        else:
            rows = [{key: value for key, value in row.items() if key != "bbox"} for row in results]
        evaluation = COCOeval_faster(truth, truth.loadRes(rows), iou_type, print_function=lambda *_: None)
        evaluation.run()
        figures |= {f"{kind}_{name}": float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return figures


def encode_masks(masks: Tensor | np.ndarray) -> list[Rle]:
    """Return the compressed run-length code of each mask (N, H, W), bool, with its counts as text for JSON."""
    array = masks.numpy() if isinstance(masks, Tensor) else masks
    return [_as_text(rle_code.encode(np.asfortranarray(mask, dtype=np.uint8))) for mask in array]


def _as_text(code: Rle) -> Rle:
    counts = code["counts"]
    size = [int(each) for each in code["size"]]
    return {"size": size, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _unpack(shares: Sequence[bytes]) -> list[list[Any]]:
    """Return images, annotations and results, each a list of every rank's."""
    return [list(parts) for parts in zip(*(json.loads(share) for share in shares), strict=True)]


def _gather_on_main(value: bytes) -> list[bytes] | None:
    """Return every rank's bytes on rank 0, None elsewhere (collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values
