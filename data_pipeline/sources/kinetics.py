"""Kinetics-400, 600, 700 and whatever is listed like them: SlowFast's `path label`, or the official annotations.

The official lists have a line for each clip: label, youtube_id, time_start, time_end, split. Its file is looked for
below the folder of the videos by the usual names, ID_000012_000022.mp4 or ID.mp4, wherever it lies; classes are the
sorted names over all lists, which is the numbering everybody uses. Many clips have gone from YouTube: they are listed
as left out.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.sources import SourceData
from data_pipeline.sources.video_lists import (
    VideoListError,
    name_lists,
    read_class_names,
    read_paths_and_labels,
    take,
    videos_by_name,
)

_NEEDED = ("label", "youtube_id", "time_start", "time_end")


def read_kinetics(
    lists: Sequence[str | os.PathLike[str]], *, videos: Path | None = None, labels: Path | None = None
) -> SourceData:
    """List the videos of `lists` (`train=FILE`, or FILE), which are below `videos`, without opening them.

    `labels`: a file of class names, in the order of their numbers. Raises VideoListError for what is no such list.
    """
    named = name_lists(lists)
    origin = f"kinetics: {', '.join(str(path) for path in named.values())}"
    official = {split: path for split, path in named.items() if _is_official(path)}
    if not official:
        return read_paths_and_labels(named, videos, labels, origin)
    if len(official) < len(named):
        raise VideoListError(f"{origin}: some are the official annotations, others not; one numbering cannot be both.")
    if videos is None:
        raise VideoListError("The official annotations name no files: name the videos' folder with --videos (videos=).")
    return _read_official(official, videos, labels, origin)


def _read_official(lists: Mapping[str, Path], videos: Path, labels: Path | None, origin: str) -> SourceData:
    rows = {split: _annotations(path) for split, path in lists.items()}
    listed = sorted({row["label"] for part in rows.values() for _, row in part})
    class_names = read_class_names(labels) if labels else listed
    number = {name: i for i, name in enumerate(class_names)}
    if not number.keys() >= set(listed):
        unknown = next(name for name in listed if name not in number)
        raise VideoListError(f"{labels} does not name class {unknown!r}, which the annotations have.")
    found = videos_by_name(videos)
    splits, rejected = {}, {}
    for split, part in rows.items():
        entries = []
        for line, row in part:
            try:
                times = f"{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except ValueError as error:
                raise VideoListError(f"{lists[split]}, line {line}: its times are no numbers: {row}.") from error
            name = f"{row['youtube_id']}_{times}"
            entries.append((name, number[row["label"]], found.get(name) or found.get(row["youtube_id"])))
        splits[split], rejected[split] = take(entries)
    return SourceData(origin, class_names, splits, "the source's own lists", rejected)


def _annotations(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line, column → value) of the official list."""
    found = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or [])]
        if missing:
            raise VideoListError(f"{path} has no column {', '.join(missing)}: a list without labels cannot be packed.")
        for row in reader:
            values = {name: (row[name] or "").strip() for name in _NEEDED}
            if not all(values.values()):
                raise VideoListError(f"{path}, line {reader.line_num}: expected {', '.join(_NEEDED)}, found {row}.")
            found.append((reader.line_num, values))
    return found


def _is_official(path: Path) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return "youtube_id" in file.readline()
