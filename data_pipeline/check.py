"""Check packed data, every byte: hashes, tar structure, indexes, labels, counts, keys, and that samples decode.

Pictures are decoded in threads, videos in processes, since a video may end the process that decodes it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.annotations import DETECTION_MEMBERS, holds_annotations
from data_pipeline.check_objects import (
    ObjectSums,
    check_annotated_pictures,
    check_objects,
    statistics,
    whole_set_problems,
)
from data_pipeline.check_samples import check_pictures, check_videos
from data_pipeline.decode import LABEL_EXTENSION
from data_pipeline.shard_index import NO_LABEL, IndexHead, ShardIndex, build_index, split_index
from data_pipeline.shards import MANIFEST, REQUIRED_FOR_CLASSIFICATION, check_members, read_manifest
from data_pipeline.tar_scan import ShardError
from data_pipeline.video_container import VIDEO_EXTENSIONS
from data_pipeline.video_inspect import DEFAULT_SPAN_S, describe

REQUIRED_FOR_VIDEO = (VIDEO_EXTENSIONS, (LABEL_EXTENSION,))
"""What a sample of shards that hold videos must have."""


@dataclass
class CheckReport:
    """What was checked and what is wrong; `ok` if nothing is, `as_dict()` for JSON, `str()` for people."""

    folder: str
    num_shards: int = 0
    num_samples: int = 0
    num_decoded: int = 0
    kind: str = "picture"
    span_s: float = DEFAULT_SPAN_S
    measured: dict[str, float] = field(default_factory=dict)
    """Of videos: seconds, and how many are short, of variable rate or rotated."""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of pictures with objects: what each packed folder holds."""
    lines: list[str] = field(default_factory=list)
    """The same in words."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is unusual but harmless."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        verdict = "all is well" if self.ok else f"{len(self.problems)} problem(s)"
        decoded = f", {self.num_decoded} {self.kind}s decoded" if self.num_decoded else ""
        head = f"{self.folder}: {self.num_shards} shard(s), {self.num_samples} samples{decoded}: {verdict}"
        if self.measured:
            head += f"\n  {describe(self.measured, self.span_s)}"
        notes = [f"  note: {note}" for note in self.notes]
        lines = [f"  {line}" for line in self.lines]
        return "\n".join([head, *lines, *(f"  problem: {problem}" for problem in self.problems), *notes])


def check_shards(
    folder: str | os.PathLike[str],
    *,
    decode: bool = True,
    sample: int | None = None,
    span_s: float = DEFAULT_SPAN_S,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a packed folder, a folder of packed folders, or a folder of bare tars (then only what needs no manifest).

    `decode`: also decode every sample, or `sample` of each shard, in `workers` threads or processes (0: one per core);
    videos shorter than `span_s` are counted. `progress(done, total)` counts shards. Every problem is named in the
    report; raises ShardError only if there is nothing to check.
    """
    folder = Path(folder)
    report = CheckReport(str(folder), span_s=span_s)
    parts = [folder] if (folder / MANIFEST).exists() or any(folder.glob("*.tar")) else []
    parts = parts or sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not parts:
        raise ShardError(f"{folder} holds neither {MANIFEST} nor .tar shards, and no packed folder.")
    manifests = {part: _manifest(part, report) for part in parts}
    shards = {part: _shards(part, manifests[part], report) for part in parts}
    total, done = sum(map(len, shards.values())), 0
    for part in parts:
        labels: Counter[int] = Counter()
        keys: list[tuple[str, str]] = []
        sums = ObjectSums()
        num_read = 0
        for tar, entry in shards[part]:
            index = _check_shard(tar, entry, report)
            if index is not None:
                num_read += 1
                _check_samples(tar, index, labels, keys, sums, manifests[part], report)
                if decode:
                    _decode(tar, index, _spread(index.head.num_samples, sample), workers, report)
            done += 1
            if progress is not None:
                progress(done, total)
        if sums.measured:
            _tell_objects(part, sums, num_read, manifests[part], report)
        _check_whole(part, labels + sums.labels, keys, num_read, manifests[part], report)
    return report


def _tell_objects(
    part: Path, sums: ObjectSums, num_read: int, manifest: dict[str, Any] | None, report: CheckReport
) -> None:
    """Check the ids of a folder of pictures with objects and report its figures."""
    whole = manifest is not None and num_read == len(manifest["shards"])
    report.problems += whole_set_problems(part, sums, manifest if whole else None)
    report.objects[str(part)], lines = statistics(sums, manifest["class_names"] if manifest else None)
    report.lines += [f"{part.name}: {line}" for line in lines]


def _manifest(part: Path, report: CheckReport) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(part)
    except ShardError as error:
        report.problems.append(str(error))
        return None
    if manifest is None:
        report.notes.append(f"{part} has no {MANIFEST}: structure and pictures checked, hashes, counts and classes not")
    return manifest


def _shards(
    part: Path, manifest: dict[str, Any] | None, report: CheckReport
) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return the shards to check with their manifest entries; those missing or not listed are problems."""
    present = sorted(part.glob("*.tar"))
    if manifest is None:
        return [(tar, None) for tar in present]
    listed = {part / entry["name"]: entry for entry in manifest["shards"]}
    report.problems += [f"{tar} is listed in {MANIFEST} but missing" for tar in listed if not tar.is_file()]
    report.problems += [f"{tar} is not listed in {MANIFEST}" for tar in present if tar not in listed]
    return [(tar, entry) for tar, entry in listed.items() if tar.is_file()]


def _check_shard(tar: Path, entry: dict[str, Any] | None, report: CheckReport) -> ShardIndex | None:
    """Check size, hash, structure and index of one shard; return its freshly built index if it has one."""
    report.num_shards += 1
    if entry is not None:
        with open(tar, "rb") as file:
            if os.fstat(file.fileno()).st_size != entry["bytes"]:
                report.problems.append(
                    f"{tar} has {os.fstat(file.fileno()).st_size} bytes, {MANIFEST} says {entry['bytes']}"
                )
            elif hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                report.problems.append(f"{tar}: its bytes are not those that were packed (SHA-256 differs)")
    try:
        content, head = build_index(str(tar))
        check_members(str(tar), head, _required(head))
    except ShardError as error:
        report.problems.append(str(error))
        return None
    report.num_samples += head.num_samples
    if entry is not None and head.num_samples != entry["samples"]:
        report.problems.append(f"{tar} has {head.num_samples} samples, {MANIFEST} says {entry['samples']}")
    _check_sidecar(tar, content, head, report)
    return split_index(np.frombuffer(content, np.uint8), head)


def _check_sidecar(tar: Path, content: bytes, head: IndexHead, report: CheckReport) -> None:
    """Compare the index beside the tar with a fresh one; one for another time or size would be built again anyway."""
    sidecar = Path(f"{tar}.idx")
    if not sidecar.exists():
        report.notes.append(f"{tar} has no index yet; the first run that opens it builds one")
    elif (found := sidecar.read_bytes()) != content:
        if f'"tar_mtime_ns": {head.tar_mtime_ns},'.encode() in found[:4096]:
            report.problems.append(f"{sidecar} does not describe its tar; delete it, it is built again")
        else:
            report.notes.append(f"{sidecar} is older than its tar (copied?); it is built again when opened")


def _check_samples(
    tar: Path,
    index: ShardIndex,
    labels: Counter[int],
    keys: list[tuple[str, str]],
    sums: ObjectSums,
    manifest: dict[str, Any] | None,
    report: CheckReport,
) -> None:
    """Check the labels, or the objects, of one shard and collect labels and keys."""
    num_classes = len(manifest["class_names"]) if manifest else None
    if holds_annotations(index.head):
        keys += [(tar.name, index.key(sample)) for sample in range(index.head.num_samples)]
        report.problems += check_objects(tar, index, num_classes, sums)
        return
    for sample, label in enumerate(index.labels.tolist()):
        key = index.key(sample)
        keys.append((tar.name, key))
        labels[label] += 1
        if label == NO_LABEL or label < 0 or (num_classes is not None and label >= num_classes):
            allowed = f"0 to {num_classes - 1}" if num_classes else "0 or more"
            report.problems.append(f"{tar.name}/{key} has label {label}, allowed: {allowed}")


def _decode(tar: Path, index: ShardIndex, samples: Sequence[int], workers: int, report: CheckReport) -> None:
    """Decode `samples` of a shard and note what is wrong with them."""
    if holds_videos(index.head):
        report.kind = "video"
        found = check_videos(tar, index, samples, workers, report.span_s, report.measured)
    elif holds_annotations(index.head):
        found = check_annotated_pictures(tar, index, samples, workers)
    else:
        found = check_pictures(tar, index, samples, workers)
    for sample, problem in found:
        if problem:
            report.problems.append(f"{tar.name}/{index.key(sample)}: {problem}")
        else:
            report.num_decoded += 1


def holds_videos(head: IndexHead) -> bool:
    """Whether a shard's samples are videos, by their members."""
    return any(extension in VIDEO_EXTENSIONS for extension in head.extensions)


def _required(head: IndexHead) -> Sequence[Sequence[str]]:
    """Return what each sample of a shard must have, by what its samples are."""
    if holds_annotations(head):
        return DETECTION_MEMBERS
    return REQUIRED_FOR_VIDEO if holds_videos(head) else REQUIRED_FOR_CLASSIFICATION


def _spread(number: int, sample: int | None) -> Sequence[int]:
    """Return all of `number` places, or `sample` of them spread evenly."""
    if sample is None or sample >= number:
        return range(number)
    return [int((i + 0.5) * number / sample) for i in range(sample)]


def _check_whole(
    part: Path,
    labels: Counter[int],
    keys: list[tuple[str, str]],
    num_read: int,
    manifest: dict[str, Any] | None,
    report: CheckReport,
) -> None:
    """Check what concerns a whole packed folder: keys, class counts and the list of sources."""
    repeated = [key for key, number in Counter(key for _, key in keys).items() if number > 1]
    if repeated:
        report.problems.append(f"{part}: {len(repeated)} key(s) occur more than once, the first: {repeated[0]}")
    if manifest is None:
        return
    if num_read < len(manifest["shards"]):  # else one lost shard would bring a problem for each class
        report.notes.append(f"{part}: class counts and sources not compared, since not every shard could be read")
        return
    for label, (name, number) in enumerate(manifest["counts"].items()):
        if labels[label] != number:
            report.problems.append(f"{part}: class {name} has {labels[label]} samples, {MANIFEST} says {number}")
    sources = part / manifest["sources"]["name"]
    try:
        lines = sources.read_bytes()
        if hashlib.sha256(lines).hexdigest() != manifest["sources"]["sha256"]:
            report.problems.append(f"{sources}: its bytes are not those that were packed (SHA-256 differs)")
        traced = [tuple(json.loads(line)[:2]) for line in lines.splitlines()]
    except (OSError, ValueError, TypeError) as error:
        report.problems.append(f"{sources} cannot be read: {error}")
        return
    if traced != keys:
        report.problems.append(f"{sources} lists {len(traced)} samples, the shards hold {len(keys)}, or others")
