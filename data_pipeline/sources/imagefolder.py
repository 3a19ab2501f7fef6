"""Pictures in class folders: ROOT/<split>/<class>/files, or ROOT/<class>/files with a held-out part.

The classes are the sorted folder names over all splits, as torchvision's ImageFolder numbers them; files in folders
below a class folder belong to the class, links are followed.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

from data_pipeline.decode import IMAGE_EXTENSIONS
from data_pipeline.order import derive_seed
from data_pipeline.sources import Rejected, SourceData, SourceSample

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def read_imagefolder(
    root: Path, *, layout: Literal["auto", "splits", "classes"] = "auto", holdout: float = 0.0, seed: int = 0
) -> SourceData:
    """List the pictures below `root` without opening them.

    `layout` "auto" takes ROOT/<split>/<class> if a folder in ROOT has a usual split's name and folders in it.
    `holdout`: the part of each class's files, drawn by `seed`, that goes to "validation"; only without splits. Raises
    ValueError for a missing or empty tree and for a `holdout` that does not fit.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name the folder that holds the splits or the class folders.")
    folders = _folders(root)
    if layout == "auto":
        named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES and _folders(folder)]
        layout = "splits" if named else "classes"
    if layout == "classes":
        return _classes(root, holdout, seed)
    if holdout:
        raise ValueError(
            f"holdout {holdout}: {root} has splits of its own; leave holdout at 0, or name one split's folder."
        )
    return _splits(root, [folder for folder in folders if _folders(folder)])


def samples(folder: Path, root: Path, labels: dict[str, int], rejected: list[Rejected]) -> Iterator[SourceSample]:
    """Yield the pictures in the class folders of `folder`, in sorted order; adds what is no picture to `rejected`."""
    for entry in sorted(folder.iterdir()):
        if entry.name not in labels or not entry.is_dir():
            rejected.append(Rejected(str(entry.relative_to(root)), "not in a class folder"))
            continue
        for file in files_below(entry):
            source, extension = str(file.relative_to(root)), file.suffix[1:].lower()
            if not file.is_file():
                rejected.append(Rejected(source, "not a file (a broken link?)"))
            elif extension in IMAGE_EXTENSIONS:
                yield SourceSample(source, labels[entry.name], extension, file.stat().st_size, file=file)
            else:
                rejected.append(Rejected(source, f"not a picture by its extension {file.suffix!r}"))


def _classes(root: Path, holdout: float, seed: int) -> SourceData:
    """ROOT/<class>/files: everything is training data but the held-out part."""
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; it is the part of each class held out, from 0 to below 1.")
    names = _class_names(root, [root])
    rejected: list[Rejected] = []
    everything = list(samples(root, root, {name: i for i, name in enumerate(names)}, rejected))
    if holdout == 0:
        return SourceData(str(root), names, {"train": everything}, "no held-out part", {"train": rejected})
    splits: dict[str, list[SourceSample]] = {"train": [], "validation": []}
    for _, group in groupby(everything, key=lambda sample: sample.label):
        # By a hash of the name, so that a file added later moves few others to the other side.
        files = sorted(group, key=lambda sample: derive_seed(seed, sample.source))
        held = round(len(files) * holdout)
        splits["validation"] += files[:held]
        splits["train"] += files[held:]
    rule = f"of each class, a part of {holdout} drawn by a hash of (seed {seed}, file name) is held out for validation"
    return SourceData(str(root), names, splits, rule, {"train": rejected})


def _splits(root: Path, folders: list[Path]) -> SourceData:
    """ROOT/<split>/<class>/files, with one class list for all splits."""
    names = _class_names(root, folders)
    labels = {name: i for i, name in enumerate(names)}
    rejected: dict[str, list[Rejected]] = {folder.name: [] for folder in folders}
    splits = {folder.name: list(samples(folder, root, labels, rejected[folder.name])) for folder in folders}
    return SourceData(str(root), names, splits, "the source's own folders", rejected)


def _class_names(root: Path, folders: list[Path]) -> list[str]:
    names = sorted({entry.name for folder in folders for entry in _folders(folder)})
    if not names:
        raise ValueError(f"{root} has no class folders; expected {root}/<split>/<class>/files or {root}/<class>/files.")
    return names


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below `folder` in sorted order, following links but no link in a circle."""
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(path) / name for name in sorted(files))
