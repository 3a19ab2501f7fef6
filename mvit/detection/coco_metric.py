"""COCO's metric: box AP and mask AP with all twelve figures each, every image exactly once over all ranks."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_code
from torch import Tensor

from data_pipeline.batch import DetectionBatch
from mvit.detection.detections import Detections
from mvit.distributed import broadcast_object, gather_on_main
from mvit.results_file import write_results_file, write_whole

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
_ENCODED_PIXELS = 1 << 27  # of masks pasted into the image at once: 128 MiB
Kind = Literal["box", "mask"]
Rle = dict[str, Any]
"""COCO's run-length code of a mask: {"size": [H, W], "counts": str}."""


class CocoMetric:
    """Collects detections, then computes AP and AR on rank 0 against the truth, which only rank 0 reads.

    Args:
        truth: returns a COCO data set (images, annotations, categories in the order of the labels); called once, on
            rank 0, by `compute`. See `data_pipeline.detection.ground_truth`.
        max_missing: so many of its images may be missing: undecodable ones, as `data.max_bad_samples` allows. Objects
            in them are not measured.
        results_file: rank 0 writes the detections there, in COCO's results format.
        per_class: rank 0 writes a table of the categories there, as CSV.
    """

    def __init__(
        self,
        truth: Callable[[], Mapping[str, Any]],
        max_missing: int = 0,
        results_file: str | Path | None = None,
        per_class: Path | None = None,
    ) -> None:
        self._truth = truth
        self._max_missing = max_missing
        self._results_file = None if results_file is None else Path(results_file)
        self._per_class = per_class
        self._seen: list[int] = []
        self._results: list[dict[str, Any]] = []  # with labels; the categories are known on rank 0
        self._boxes_alone = False

    def update(self, predictions: Sequence[Detections], batch: DetectionBatch) -> None:
        """Add the detections of a batch; images of weight 0 are padding and do not count."""
        rows = zip(
            predictions,
            batch.image_ids.tolist(),
            batch.original_sizes.tolist(),
            batch.weights.tolist(),
            strict=True,
        )
        for found, image_id, (height, width), weight in rows:
            if weight > 0:
                self.add(found, image_id, (height, width))

    def add(self, found: Detections, image_id: int, original: tuple[int, int]) -> None:
        """Add what was found in one image; boxes and masks are resized to the original's size (H, W)."""
        self._seen.append(int(image_id))
        self._boxes_alone |= found.masks is None
        found = found if found.size == original else found.resized(original)
        codes = [None] * len(found) if found.masks is None else _encode(found)
        rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), codes, strict=True)
        for (left, top, right, bottom), label, score, code in rows:
            mask = {} if code is None else {"segmentation": code}
            box = [left, top, right - left, bottom - top]
            self._results.append({"image_id": int(image_id), "label": label, "bbox": box, "score": score} | mask)

    def compute(self) -> dict[str, float]:
        """Return box_ap, box_ap50, … mask_ar_large, and the number of images, over all ranks (collective).

        Fractions; -1 where there is nothing to measure. The figures of masks are there if the detections have masks.
        Raises RuntimeError on every rank if an image was seen twice, not at all, or is not in the truth.
        """
        # As bytes: rank 0 alone takes them apart. Compressed masks of 5,000 images are about 50 MB in all
        shares = gather_on_main(json.dumps([self._seen, self._results, self._boxes_alone]).encode())
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

    def _evaluate(self, shares: Sequence[bytes]) -> dict[str, float]:
        parts = [json.loads(share) for share in shares]
        seen = Counter(image for part in parts for image in part[0])
        truth = self._truth()
        self._check_images(seen, {int(image["id"]) for image in truth["images"]})
        # The same order on any number of ranks: the figures of tied scores depend on it
        found = sorted((row for part in parts for row in part[1]), key=lambda row: row["image_id"])
        ids = [category["id"] for category in truth["categories"]]
        results = [
            {"image_id": row["image_id"], "category_id": ids[row["label"]]}
            | {key: value for key, value in row.items() if key not in ("image_id", "label")}
            for row in found
        ]
        if self._results_file is not None:
            write_results_file(self._results_file, results)
        measured = {
            "images": [image for image in truth["images"] if image["id"] in seen],
            "annotations": [row for row in truth["annotations"] if row["image_id"] in seen],
            "categories": truth["categories"],
        }
        evaluations = _evaluations(measured, results, masks=not any(part[2] for part in parts))
        if self._per_class is not None:
            write_whole(self._per_class, category_table(measured, evaluations).encode())
        return _figures(evaluations) | {"images": float(len(seen))}

    def _check_images(self, seen: Counter[int], expected: set[int]) -> None:
        repeated = sorted(image for image, count in seen.items() if count > 1)
        missing, unknown = sorted(expected - seen.keys()), sorted(seen.keys() - expected)
        if repeated:
            raise ValueError(f"{len(repeated)} images were seen more than once, image {repeated[0]} among them")
        if unknown:
            raise ValueError(f"{len(unknown)} images are not in the truth, image {unknown[0]} among them")
        if len(missing) > self._max_missing:
            raise ValueError(
                f"{len(missing)} of {len(expected)} images were not seen, image {missing[0]} among them; "
                f"{self._max_missing} may be missing"
            )


def coco_figures(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, masks: bool = True
) -> dict[str, float]:
    """Return the twelve figures of boxes and of masks, box_ap … mask_ar_large, by COCOeval (faster-coco-eval).

    truth: a COCO data set: images, annotations, categories. results: in COCO's results format. masks: measure
    them too, which truth and results must all have.
    """
    return _figures(_evaluations(truth, results, masks=masks))


def _figures(evaluations: Mapping[Kind, COCOeval_faster]) -> dict[str, float]:
    return {
        f"{kind}_{name}": float(value)
        for kind, evaluation in evaluations.items()
        for name, value in zip(FIGURES, evaluation.stats, strict=True)
    }


def category_table(truth: Mapping[str, Any], evaluations: Mapping[Kind, COCOeval_faster]) -> str:
    """Return AP and AP50 of each category as CSV, with the number of its objects (crowds not counted).

    An AP is empty where the set has no object of the category.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["id", "name", "objects", *(f"{kind}_{name}" for kind in evaluations for name in ("ap", "ap50"))])
    objects = Counter(row["category_id"] for row in truth["annotations"] if not row["iscrowd"])
    for category in truth["categories"]:
        figures = [each for evaluation in evaluations.values() for each in _category_ap(evaluation, category["id"])]
        out.writerow([category["id"], category["name"], objects[category["id"]], *figures])
    return text.getvalue()


def _category_ap(evaluation: COCOeval_faster, category: int) -> tuple[str, str]:
    """Return a category's AP and AP50, of all sizes and with the most detections a picture."""
    place = list(evaluation.params.catIds).index(category)
    # overlaps x recalls, -1 where the category has no object
    precision = np.asarray(evaluation.eval["precision"])[:, :, place, 0, -1]
    shares = [rows[rows > -1] for rows in (precision, precision[:1])]
    return tuple(f"{share.mean():.4f}" if share.size else "" for share in shares)  # pyright: ignore[reportReturnType]


def _evaluations(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, masks: bool
) -> dict[Kind, COCOeval_faster]:
    """Run COCOeval on boxes, and on masks."""
    found: dict[Kind, COCOeval_faster] = {}
    kinds: tuple[tuple[Kind, str], ...] = (("box", "bbox"), ("mask", "segm"))
    for kind, iou_type in kinds[: 2 if masks else 1]:
        # A result's area is its mask's in the evaluation of masks and its box's in that of boxes (as detectron2 does;
        # COCOeval itself takes the box wherever there is one, which moves AP of small, medium and large)
        hidden = "segmentation" if kind == "box" else "bbox"
        rows = [{key: value for key, value in row.items() if key != hidden} for row in results]
        fresh = {key: [dict(row) for row in truth[key]] for key in ("images", "annotations", "categories")}
        known = COCO({"info": {}, **fresh})
        evaluation = COCOeval_faster(known, known.loadRes(rows), iou_type, print_function=lambda *_: None)
        evaluation.run()
        found[kind] = evaluation
    return found


def _encode(found: Detections) -> list[Rle]:
    """Return the code of each detection's mask in the image; few at once, a hundred of 12 megapixels are 1.2 GB."""
    step = max(1, _ENCODED_PIXELS // (found.size[0] * found.size[1]))
    parts = (found[slice(start, start + step)] for start in range(0, len(found), step))
    return [code for part in parts for code in encode_masks(part.pasted().cpu())]


def encode_masks(masks: Tensor | np.ndarray) -> list[Rle]:
    """Return the compressed run-length code of each mask (N, H, W), bool, with its counts as text for JSON."""
    array = masks.numpy() if isinstance(masks, Tensor) else masks
    return [_as_text(rle_code.encode(np.asfortranarray(mask, dtype=np.uint8))) for mask in array]


def _as_text(code: Rle) -> Rle:
    counts = code["counts"]
    size = [int(each) for each in code["size"]]
    return {"size": size, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
