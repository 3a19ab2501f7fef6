"""Something-Something v2: the official JSON lists with labels.json, or SlowFast's `path label`.

An entry of the official list has an id, the file's name below the folder of the videos, and a template such as
"Pushing [something] from left to right"; labels.json numbers the templates without their brackets.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.sources import SourceData
from data_pipeline.sources.video_lists import (
    VideoListError,
    name_lists,
    read_class_names,
    read_paths_and_labels,
    take,
    videos_by_name,
)

_NUMBERS = ("labels.json", "something-something-v2-labels.json")


def read_ssv2(
    lists: Sequence[str | os.PathLike[str]], *, videos: Path | None = None, labels: Path | None = None
) -> SourceData:
    """List the videos of `lists` (`train=FILE`, or FILE), which are below `videos`, without opening them.

    `labels`: labels.json; by default the one beside the first list. Raises VideoListError for what is no such list.
    """
    named = name_lists(lists)
    origin = f"something-something v2: {', '.join(str(path) for path in named.values())}"
    official = [split for split, path in named.items() if path.suffix.lower() == ".json"]
    if not official:
        return read_paths_and_labels(named, videos, labels, origin)
    if len(official) < len(named):
        raise VideoListError(f"{origin}: some are JSON, others not; give all lists in one format.")
    if videos is None:
        raise VideoListError("The official lists name no files: name the videos' folder with --videos (videos=).")
    first = next(iter(named.values()))
    class_names = read_class_names(labels or _numbers_beside(first))
    number = {_plain(name): i for i, name in enumerate(class_names)}
    found = videos_by_name(videos)
    splits, rejected = {}, {}
    for split, path in named.items():
        entries = [(key, number.get(label), found.get(key)) for key, label in _entries(path)]
        unknown = next((key for key, label, _ in entries if label is None), None)
        if unknown is not None:
            raise VideoListError(f"{path}: the template of video {unknown} is not among the {len(number)} labels.")
        splits[split], rejected[split] = take((key, label or 0, file) for key, label, file in entries)
    return SourceData(origin, class_names, splits, "the source's own lists", rejected)


def _entries(path: Path) -> list[tuple[str, str]]:
    """Return (id, template without brackets) of each entry."""
    try:
        content: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [(str(entry["id"]), _plain(str(entry["template"]))) for entry in content]
    except KeyError as error:
        raise VideoListError(f"{path} has an entry without {error}: a list without labels cannot be packed.") from error
    except (ValueError, TypeError) as error:
        raise VideoListError(f"{path} is no list of Something-Something v2: {error}.") from error


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _numbers_beside(path: Path) -> Path:
    for name in _NUMBERS:
        if (path.parent / name).is_file():
            return path.parent / name
    raise VideoListError(f"There is no {' or '.join(_NUMBERS)} beside {path}: name it with --labels (labels=).")
