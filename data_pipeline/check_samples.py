"""Decode the samples of a shard to see whether they can be: pictures in threads, videos in processes."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_pipeline.decode import DecodeError, class_label, decode_rgb, picture
from data_pipeline.shard_index import ShardIndex
from data_pipeline.video_container import VIDEO_EXTENSIONS
from data_pipeline.video_decode import VideoFacts
from data_pipeline.video_inspect import FACTS_EXTENSION, Inspection, measures
from data_pipeline.video_processes import inspect_all


def check_pictures(
    tar: Path, index: ShardIndex, samples: Sequence[int], workers: int
) -> Iterator[tuple[int, str | None]]:
    """Yield each sample with what is wrong with it, or None."""
    with open(tar, "rb") as file, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from zip(samples, pool.map(partial(_check_picture, file.fileno(), index), samples), strict=True)


def check_videos(
    tar: Path, index: ShardIndex, samples: Sequence[int], workers: int, span_s: float, measured: dict[str, float]
) -> Iterator[tuple[int, str | None]]:
    """Yield each sample with what is wrong with it, or None; adds what was measured to `measured`."""
    tasks = []
    for sample in samples:
        offset, size = next((at, size) for name, at, size in index.members(sample) if name in VIDEO_EXTENSIONS)
        tasks.append(Inspection(str(tar), offset, size))
    with open(tar, "rb") as file:
        for sample, (_, finding) in zip(samples, inspect_all(tasks, workers=workers), strict=True):
            problem = finding.problem or _label_problem(_small_members(file.fileno(), index, sample))
            if problem is None and finding.facts is not None:
                for name, value in measures(finding.facts, finding.facts, span_s).items():
                    measured[name] = measured.get(name, 0) + value
                problem = _facts_problem(_small_members(file.fileno(), index, sample), finding.facts)
            yield sample, problem


def _check_picture(file: int, index: ShardIndex, sample: int) -> str | None:
    members = {extension: os.pread(file, size, offset) for extension, offset, size in index.members(sample)}
    try:
        class_label(members)
        decode_rgb(picture(members))
    except DecodeError as error:
        return str(error)
    return None


def _small_members(file: int, index: ShardIndex, sample: int) -> dict[str, bytes]:
    """Read all members but the video."""
    members = index.members(sample)
    return {name: os.pread(file, size, offset) for name, offset, size in members if name not in VIDEO_EXTENSIONS}


def _label_problem(members: Mapping[str, bytes]) -> str | None:
    try:
        class_label(members)
    except DecodeError as error:
        return str(error)
    return None


def _facts_problem(members: Mapping[str, bytes], facts: VideoFacts) -> str | None:
    """Compare what was measured when the video was packed, if that is there."""
    text = members.get(FACTS_EXTENSION)
    if text is None:
        return None
    try:
        packed = json.loads(text)
        number = packed["num_frames"]
    except (ValueError, KeyError, TypeError):
        return None  # another program's JSON
    return None if number == facts.num_frames else f"it has {facts.num_frames} frames, {number} when it was packed"
