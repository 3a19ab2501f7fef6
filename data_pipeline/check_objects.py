"""Check the objects of packed pictures: the rules for each, ids over a whole set, pictures of their size."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.annotations import (
    ANNOTATIONS_EXTENSION,
    describe_objects,
    object_measures,
    picture_problems,
    read_annotations,
)
from data_pipeline.decode import DecodeError, decode_rgb, picture
from data_pipeline.shard_index import ShardIndex


@dataclass
class ObjectSums:
    """What is collected over the shards of one packed folder."""

    labels: Counter[int] = field(default_factory=Counter)
    measured: Counter[str] = field(default_factory=Counter)
    image_ids: list[int] = field(default_factory=list)
    num_objects: list[int] = field(default_factory=list)
    annotation_ids: Counter[int] = field(default_factory=Counter)


def check_objects(tar: Path, index: ShardIndex, num_classes: int | None, sums: ObjectSums) -> Iterator[str]:
    """Yield what is wrong with the objects of a shard, by the json members alone, and add up what they hold."""
    with open(tar, "rb") as file:
        for sample in range(index.head.num_samples):
            key = f"{tar.name}/{index.key(sample)}"
            try:
                annotated = read_annotations(_members(file.fileno(), index, sample, (ANNOTATIONS_EXTENSION,)))
            except DecodeError as error:
                yield f"{key}: {error}"
                continue
            yield from (f"{key}: {problem}" for problem in picture_problems(annotated, num_classes))
            sums.labels.update(a.label for a in annotated.annotations)
            sums.measured.update(object_measures(annotated))
            sums.image_ids.append(annotated.image_id)
            sums.num_objects.append(sum(not a.is_crowd for a in annotated.annotations))
            sums.annotation_ids.update({a.id for a in annotated.annotations})


def check_annotated_pictures(
    tar: Path, index: ShardIndex, samples: Sequence[int], workers: int
) -> Iterator[tuple[int, str | None]]:
    """Decode pictures and yield each sample with what is wrong with it, or None."""
    with open(tar, "rb") as file, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from zip(samples, pool.map(partial(_check_picture, file.fileno(), index), samples), strict=True)


def whole_set_problems(folder: Path, sums: ObjectSums, manifest: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with the ids of a packed folder, and where its manifest tells another story."""
    problems = []
    for name, ids in (("image", Counter(sums.image_ids)), ("annotation", sums.annotation_ids)):
        repeated = [key for key, number in ids.items() if number > 1]
        if repeated:
            problems.append(f"{folder}: {len(repeated)} {name} id(s) occur more than once, the first: {repeated[0]}")
    for name, found in (("image_ids", sums.image_ids), ("num_objects", sums.num_objects)):
        if manifest is not None and name in manifest and manifest[name] != found:
            problems.append(f"{folder}: {name} in the manifest are not those of the shards")
    return problems


def statistics(sums: ObjectSums, class_names: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of a packed folder, for JSON and for people."""
    names = class_names or [str(label) for label in range(max(sums.labels, default=-1) + 1)]
    counts = {name: sums.labels[label] for label, name in enumerate(names)}
    lines = describe_objects(sums.measured, counts) if sums.measured else []
    return {**sums.measured, "by_category": counts}, lines


def _check_picture(file: int, index: ShardIndex, sample: int) -> str | None:
    members = _members(file, index, sample, None)
    try:
        annotated = read_annotations(members)
        size = decode_rgb(picture(members)).shape[:2]
    except DecodeError as error:
        return str(error)
    if size != (annotated.height, annotated.width):
        return f"the picture is {size} (height, width), its annotations say {(annotated.height, annotated.width)}"
    return None


def _members(file: int, index: ShardIndex, sample: int, only: Sequence[str] | None) -> dict[str, bytes]:
    members = index.members(sample)
    return {name: os.pread(file, size, offset) for name, offset, size in members if only is None or name in only}
