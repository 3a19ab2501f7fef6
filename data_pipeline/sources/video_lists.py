"""Lists of labelled videos: what the packers of video data sets share in reading them and finding the files."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_pipeline.sources import Rejected, SourceData, SourceSample
from data_pipeline.video_container import VIDEO_EXTENSIONS

_PATH_LABEL = re.compile(r"^\s*(.+?)[\s,]+(\d+)\s*$")  # the path may have spaces and commas in it


class VideoListError(ValueError):
    """A list of videos that cannot be read as what it is taken for; the message names file, line and way out."""


def name_lists(lists: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return split → file of arguments such as `train=train.csv`; one without a name gets the file's, `train.csv`."""
    named: dict[str, Path] = {}
    for text in (os.fspath(item) for item in lists):
        name, _, place = text.rpartition("=")
        if name and ("/" in name or Path(text).is_file()):  # an = in the path itself
            name, place = "", text
        path = Path(place)
        name = name or path.stem
        if not path.is_file():
            raise VideoListError(f"{place} is no file; name the list of split {name}, as {name}=FILE or FILE.")
        if name in named:
            raise VideoListError(f"{named[name]} and {path} are both split {name}: name them, as train={path}.")
        if not name or name.startswith(".") or "/" in name:
            raise VideoListError(f"{text}: {name!r} cannot be the name of a split.")
        named[name] = path
    return named


def read_paths_and_labels(
    lists: Mapping[str, Path], videos: Path | None, labels: Path | None, origin: str
) -> SourceData:
    """Read lists of `path label` lines, as SlowFast's: relative paths are below `videos`, or else beside the list.

    Raises VideoListError for a line that is none, and for a label beyond the names in `labels`.
    """
    names = read_class_names(labels) if labels else None
    splits, rejected = {}, {}
    highest = -1
    for split, path in lists.items():
        root = videos or path.parent
        entries: list[tuple[str, int, Path]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if not line.strip():
                continue
            parts = _PATH_LABEL.match(line)
            if parts is None or (names is not None and int(parts[2]) >= len(names)):
                allowed = "a class number from 0" + (f" to {len(names) - 1}" if names else "")
                raise VideoListError(f"{path}, line {number}: expected a path and {allowed}, found {line.strip()!r}.")
            name, label = parts[1].strip('"'), int(parts[2])
            entries.append((name, label, root / name))
            highest = max(highest, label)
        splits[split], rejected[split] = take(entries)
    class_names = names or [str(label) for label in range(highest + 1)]
    return SourceData(origin, class_names, splits, "the source's own lists", rejected)


def take(entries: Iterable[tuple[str, int, Path | None]]) -> tuple[list[SourceSample], list[Rejected]]:
    """Divide (name, label, file or None) into samples and what cannot be one, with the reason."""
    samples, rejected = [], []
    seen: set[tuple[str, int]] = set()
    for name, label, file in entries:
        if (name, label) in seen:
            rejected.append(Rejected(name, "listed before, with the same label"))
        elif file is None or not file.is_file():
            rejected.append(Rejected(name, "no such file" if file is None or not file.exists() else "not a file"))
        elif file.suffix[1:].lower() not in VIDEO_EXTENSIONS:
            rejected.append(Rejected(name, f"not a video by its extension {file.suffix!r}"))
        else:
            samples.append(SourceSample(name, label, file.suffix[1:].lower(), file.stat().st_size, file=file))
        seen.add((name, label))
    return samples, rejected


def videos_by_name(root: Path) -> dict[str, Path]:
    """Return file name without extension → path of all videos below `root`."""
    if not root.is_dir():
        raise VideoListError(f"{root} is no folder; name the one that holds the videos with --videos (videos=).")
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(files):
            stem, extension = os.path.splitext(name)
            if extension[1:].lower() in VIDEO_EXTENSIONS:
                found.setdefault(stem, Path(folder) / name)
    return found


def read_class_names(path: Path) -> list[str]:
    """Read the class names in order: a text with one a line, or JSON, a list or an object name → number.

    Raises VideoListError unless the numbers are 0, 1, 2, … without a gap.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
        if isinstance(content, list):
            return [str(name) for name in content]
        numbers = {int(number): str(name).strip('"') for name, number in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise VideoListError(f"{path} is no list of class names: {error}.") from error
    if sorted(numbers) != list(range(len(content))):
        raise VideoListError(f"{path}: its {len(content)} classes are not numbered 0 to {len(content) - 1}.")
    return [numbers[number] for number in range(len(content))]
