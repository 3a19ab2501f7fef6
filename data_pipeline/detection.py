"""Pictures with objects: augmentation that keeps boxes and masks right, batches of pictures of different sizes.

Masks stay encoded until a picture's view is chosen; then N x h x w bytes are drawn for the N objects that are in it, a
MiB for an object at 1024 x 1024. Normalising happens on the device, so that a batch travels as bytes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.annotations import (
    ANNOTATIONS_EXTENSION,
    DETECTION_MEMBERS,
    AnnotatedPicture,
    picture_problems,
    read_annotations,
)
from data_pipeline.batch import DetectionBatch
from data_pipeline.decode import DecodeError, decode_rgb, picture
from data_pipeline.detection_views import DetectionAugmentConfig, View, evaluation_views, training_view
from data_pipeline.masks import mask_box, rasterise
from data_pipeline.reads import Item
from data_pipeline.shards import ShardSet

__all__ = [
    "DETECTION_MEMBERS",
    "DetectionAugmentConfig",
    "DetectionExample",
    "DetectionTransform",
    "categories",
    "collate_detections",
    "ground_truth",
    "training_samples",
]

_CUT = 1e-3  # of a pixel: a box that leaves the view by less is not cut


class DetectionExample(NamedTuple):
    """One picture as the model will see it, without padding."""

    pixels: np.ndarray
    """(h, w, 3) uint8."""
    boxes: np.ndarray
    """(N, 4) float32, XYXY in pixels."""
    labels: np.ndarray
    """(N,) int64."""
    is_crowd: np.ndarray
    """(N,) bool."""
    masks: np.ndarray | None
    """(N, h, w) bool, None if the config has none."""
    original_size: tuple[int, int]
    image_id: int
    canvas: tuple[int, int] = (0, 0)
    """The least height and width of its batch."""
    views: tuple[np.ndarray, ...] = ()
    """The picture at each size of a test of several views, (h, w, 3) uint8; `pixels` is the first."""


class DetectionTransform:
    """Turn a sample's members into a `DetectionExample`; a pure function of (members, seed).

    `train`: a view drawn from the seed; objects of which nothing is left in it are dropped, the box of one that is cut
    is that of what is left of its mask. Otherwise the config's test with all its views and all objects, and the seed is
    ignored. Raises DecodeError for a sample without a readable picture or objects, or without masks where the config
    wants them.
    """

    def __init__(self, config: DetectionAugmentConfig, train: bool) -> None:
        self.config, self.train = config, train

    def __call__(self, members: dict[str, bytes], seed: int) -> DetectionExample:
        annotated = read_annotations(members)
        pixels = decode_rgb(picture(members))
        size = annotated.height, annotated.width
        if pixels.shape[:2] != size:
            raise DecodeError(f"the picture is {pixels.shape[:2]} (height, width), its annotations say {size}")
        if self.config.masks and (bare := [a.id for a in annotated.annotations if a.segmentation is None]):
            raise DecodeError(
                f"{len(bare)} object(s) have no mask, e.g. {bare[0]}; for boxes alone set detection.masks=false and "
                "detector.masks=false"
            )
        if not self.train:
            return self._tested(pixels, annotated)
        return self._seen(pixels, annotated, training_view(*size, self.config, seed))

    def unlabelled(self, data: bytes) -> DetectionExample:
        """Turn an encoded picture whose objects are not known into an example as in the test. Raises DecodeError."""
        pixels = decode_rgb(data)
        height, width = pixels.shape[:2]
        return self._tested(pixels, AnnotatedPicture(-1, "", height, width, ()))

    def padding(self) -> DetectionExample:
        """Return the example that fills up an evaluation batch: a picture of one cell without objects."""
        side = self.config.size_divisibility
        masks = np.zeros((0, side, side), bool) if self.config.masks else None
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
        pixels = np.full((side, side, 3), self.config.fill, np.uint8)
        views = () if self.train or self.config.num_views == 1 else (pixels,)
        return DetectionExample(pixels, *none, masks, (side, side), -1, views=views)

    def _tested(self, pixels: np.ndarray, annotated: AnnotatedPicture) -> DetectionExample:
        """Return the picture as the test sees it; of several views the first is the example's own."""
        height, width = pixels.shape[:2]
        first, *others = evaluation_views(height, width, self.config)
        example = self._seen(pixels, annotated, first)
        if self.config.num_views == 1:
            return example
        return example._replace(views=(example.pixels, *(view.pixels(pixels) for view in others)))

    def _seen(self, pixels: np.ndarray, annotated: AnnotatedPicture, view: View) -> DetectionExample:
        height, width = view.size
        edges = np.array([width, height] * 2, np.float32)
        boxes = view.boxes(annotated.boxes())
        cut: np.ndarray = np.any((boxes < -_CUT) | (boxes > edges + _CUT), axis=1)
        boxes = boxes.clip(0, edges)
        kept: np.ndarray = np.ones(len(boxes), bool)
        if self.train:
            kept = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        masks = None
        if self.config.masks:
            masks = _masks(annotated, np.flatnonzero(kept), view)
            if self.train:
                seen: np.ndarray = np.any(masks, axis=(1, 2))
                kept[np.flatnonzero(kept)[~seen]] = False
                if not np.all(seen):
                    masks = masks[np.flatnonzero(seen)]
                for place, number in enumerate(np.flatnonzero(kept).tolist()):
                    if cut[number]:
                        box = mask_box(masks[place])
                        assert box is not None  # such were dropped
                        boxes[number] = box
        labels = np.array([a.label for a in annotated.annotations], np.int64)
        is_crowd = np.array([a.is_crowd for a in annotated.annotations], bool)
        size = annotated.height, annotated.width
        return DetectionExample(
            view.pixels(pixels),
            boxes[kept],
            labels[kept],
            is_crowd[kept],
            masks,
            size,
            annotated.image_id,
            self.config.canvas if self.train else (0, 0),
        )


def _masks(annotated: AnnotatedPicture, chosen: np.ndarray, view: View) -> np.ndarray:
    """Draw the masks of some objects as the view shows them: (N, h, w) bool."""
    masks = np.zeros((len(chosen), *view.size), bool)
    size = annotated.height, annotated.width
    for mask, number in zip(masks, chosen.tolist(), strict=True):
        segmentation = annotated.annotations[number].segmentation
        assert segmentation is not None
        try:
            rasterise(segmentation, size, view.window, view.size, mask)
        except (ValueError, RuntimeError, LookupError, TypeError) as error:  # the library's own, for a broken mask
            raise DecodeError(f"mask of annotation {annotated.annotations[number].id}: {error!r}") from error
    return masks[:, :, ::-1] if view.flipped else masks


def collate_detections(items: Sequence[Item], config: DetectionAugmentConfig) -> DetectionBatch:
    """Put `DetectionExample`s into a `DetectionBatch`, padded to the largest, or to the training policy's own size."""
    examples: list[DetectionExample] = [item.example for item in items]
    views = [view for e in examples for view in e.views]
    unit = config.size_divisibility
    height, width = (
        -(-max(max(e.pixels.shape[axis], e.canvas[axis]) for e in examples) // unit) * unit for axis in (0, 1)
    )
    images = np.empty((len(examples), height, width, 3), np.uint8)
    images[:] = config.fill
    counts = tuple(len(e.boxes) for e in examples)
    masks = np.zeros((sum(counts), height, width), bool) if config.masks else None
    first = 0
    for place, e in enumerate(examples):
        rows, columns = e.pixels.shape[:2]
        images[place, :rows, :columns] = e.pixels
        if masks is not None and e.masks is not None:
            masks[first : first + counts[place], :rows, :columns] = e.masks
        first += counts[place]
    return DetectionBatch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),  # (B, H, W, 3) in memory: channels-last for free
        sizes=torch.tensor([e.pixels.shape[:2] for e in examples], dtype=torch.int64),
        original_sizes=torch.tensor([e.original_size for e in examples], dtype=torch.int64),
        image_ids=torch.tensor([e.image_id for e in examples], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        sample_ids=torch.tensor([item.sample_id for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
        num_objects=counts,
        all_boxes=torch.from_numpy(np.concatenate([e.boxes for e in examples])),
        all_labels=torch.from_numpy(np.concatenate([e.labels for e in examples])),
        all_is_crowd=torch.from_numpy(np.concatenate([e.is_crowd for e in examples])),
        all_masks=None if masks is None else torch.from_numpy(masks),
        view_sizes=tuple(tuple((v.shape[0], v.shape[1]) for v in e.views) for e in examples) if views else (),
        all_views=torch.from_numpy(np.concatenate([view.reshape(-1) for view in views])) if views else None,
    )


# --- what is known of a whole set -------------------------------------------------------------------------------


def training_samples(shards: ShardSet, config: DetectionAugmentConfig) -> ShardSet:
    """Return the samples to train on: all, or with `skip_empty` those with an object that is no crowd.

    How many objects a picture has stands in the manifests; of shards without, every json member is read.
    Raises ValueError if no picture has an object.
    """
    if not config.skip_empty:
        return shards
    if shards.manifests and all("num_objects" in manifest for manifest in shards.manifests):
        numbers = [number for manifest in shards.manifests for number in manifest["num_objects"]]
    else:
        pictures = (_annotations(shards, sample) for sample in range(len(shards)))
        numbers = [sum(not a.is_crowd for a in p.annotations) for p in pictures]
    chosen = np.flatnonzero(np.array(numbers))
    if not len(chosen):
        raise ValueError(f"None of the {len(shards)} training pictures has an object; there is nothing to train on.")
    return shards if len(chosen) == len(shards) else shards.select(chosen)


def categories(shards: ShardSet) -> list[dict[str, Any]]:
    """Return the categories of the source in the order of the labels, as COCO lists them.

    Of shards without a manifest they are not known: then an empty list. Raises ValueError if folders differ in them.
    """
    lists = [manifest.get("categories", []) for manifest in shards.manifests]
    if any(one != lists[0] for one in lists):
        raise ValueError("The packed folders have different categories; their labels mean different things.")
    return lists[0] if lists else []


def ground_truth(shards: ShardSet, num_classes: int) -> dict[str, Any]:
    """Return a set's objects as a COCO data set, to be measured against; reads the json members, not the pictures.

    Boxes, areas and masks are the source's own; annotations are numbered anew from 1, since COCOeval takes an id of 0
    for none. Labels of shards without categories become ids from 1. Raises DecodeError, also for what is wrong with an
    object: a mask that is no run-length code can keep COCO's tools busy for ever.
    """
    known = categories(shards) or [{"id": label + 1, "name": str(label)} for label in range(num_classes)]
    images, annotations = [], []
    for sample in range(len(shards)):
        p = _annotations(shards, sample)
        if problems := picture_problems(p, num_classes):
            raise DecodeError(f"{'; '.join(problems[:3])}: pack the validation set anew (`mvit data check` lists all)")
        images.append({"id": p.image_id, "file_name": p.file_name, "height": p.height, "width": p.width})
        for a in p.annotations:
            mask = {} if a.segmentation is None else {"segmentation": a.segmentation}
            facts = {"id": len(annotations) + 1, "image_id": p.image_id, "category_id": known[a.label]["id"]}
            facts |= {"bbox": list(a.bbox), "area": a.area, "iscrowd": int(a.is_crowd)}
            annotations.append(facts | mask)
    return {"images": images, "annotations": annotations, "categories": known}


def _annotations(shards: ShardSet, sample: int) -> AnnotatedPicture:
    return read_annotations(shards.read(sample, (ANNOTATIONS_EXTENSION,)))
