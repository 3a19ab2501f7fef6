"""ImageNet-21K, the winter release of 2021, as class tars or class folders; ImageNet-1K's classes are numbered first.

The release has 19,167 classes: all of ImageNet-1K's but n04399382, teddy bear, which no release of ImageNet-21K has.
With ImageNet-1K's 1,000 in front, the two make the 19,168 of MViTv2's released weights, and the first 1,000 logits can
be validated on ImageNet-1K, as published. Nothing says how the other 18,168 are ordered in those weights: here they
are sorted, and a file of class names can say otherwise.
"""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from data_pipeline.decode import IMAGE_EXTENSIONS
from data_pipeline.sources import Rejected, SourceData, SourceSample
from data_pipeline.sources.imagefolder import files_below
from data_pipeline.tar_scan import scan_tar

PUBLISHED_CLASSES = 19_168

_CLASS = re.compile(r"(n\d{8})(\.tar)?")
_Found = tuple[list[SourceSample], list[Rejected]]


def read_imagenet21k(
    source: Path,
    imagenet1k: Path | None = None,
    classes: Path | None = None,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SourceData:
    """List the pictures of the class tars (n01440764.tar) or class folders in `source`, without decoding them.

    `imagenet1k`: such a folder of ImageNet-1K's training set; of a class that both have, its pictures are added whose
    file names the other has not. `classes`: a text with one class name a line, in the order of the numbers. `progress`
    is called per class. Raises ValueError for a folder without classes and a list that does not fit, ShardError for a
    tar that is not whole.
    """
    first = imagenet1k_classes()
    rejected: list[Rejected] = []
    places = _class_places(source, rejected)
    further = {} if imagenet1k is None else _class_places(imagenet1k, rejected)
    strangers = sorted(further.keys() - set(first))
    if strangers:
        raise ValueError(
            f"{imagenet1k} has classes that ImageNet-1K has not, {strangers[0]} for one; name its train folder."
        )
    names = _numbered(first, places.keys() | further.keys(), classes)
    labels = {name: label for label, name in enumerate(names)}
    both = [name for name in names if name in places or name in further]
    samples: list[SourceSample] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # reading headers is waiting for the disk
        jobs = [pool.submit(_of_class, name, labels[name], places.get(name), further.get(name)) for name in both]
        for number, job in enumerate(jobs, start=1):
            found, bad = job.result()
            samples += found
            rejected += bad
            if progress is not None:
                progress(number, len(both))
    rule = f"{len(places)} classes of {source.name}"
    rule += f" with {len(further)} of ImageNet-1K: each file name once a class" if further else ", without ImageNet-1K"
    return SourceData(str(source), names, {"train": samples}, rule, {"train": rejected})


def imagenet1k_classes() -> list[str]:
    """Return ImageNet-1K's 1,000 classes in the order of their numbers."""
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo("imagenet1k")
    return [known.index_to_label_name(number) for number in range(1000)]


def _numbered(first: list[str], found: Iterable[str], listed: Path | None) -> list[str]:
    """Return all classes in the order of their numbers."""
    if listed is None:
        return first + sorted(set(found) - set(first))
    names = listed.read_text().split()
    if names[: len(first)] != first:
        wrong = next((n for n, pair in enumerate(zip(names, first, strict=False), 1) if pair[0] != pair[1]), len(names))
        raise ValueError(
            f"{listed}: its first {len(first)} lines must be ImageNet-1K's classes in order, so that these logits can "
            f"be validated on ImageNet-1K; line {wrong} is not."
        )
    missing = sorted(set(found) - set(names))
    if missing or len(set(names)) < len(names):
        what = (
            f"{len(missing)} classes of the source are not in it, {missing[0]} for one" if missing else "names repeat"
        )
        raise ValueError(f"{listed}: {what}; list every class once.")
    return names


def _class_places(root: Path, rejected: list[Rejected]) -> dict[str, Path]:
    """Return class → its folder or tar."""
    if not root.is_dir():
        hint = " Unpack the release first; the tars of the classes may stay packed." if root.is_file() else ""
        raise ValueError(f"{root} is no folder; name the folder of class tars (n01440764.tar) or class folders.{hint}")
    places: dict[str, Path] = {}
    others: list[Path] = []
    for entry in sorted(root.iterdir()):
        match = _CLASS.fullmatch(entry.name)
        if match is None or entry.is_dir() == bool(match.group(2)):
            others.append(entry)
        elif match.group(1) in places:
            raise ValueError(f"{root} has {match.group(1)} as a folder and as a tar; remove one of them.")
        else:
            places[match.group(1)] = entry
    if not places:
        inside = next(
            (one for one in others if one.is_dir() and any(_CLASS.fullmatch(e.name) for e in one.iterdir())), None
        )
        hint = f"; did you mean {inside}?" if inside else ""
        raise ValueError(f"{root} has no class tars (n01440764.tar) and no class folders (n01440764){hint}")
    rejected += [Rejected(one.name, "no class tar and no class folder by its name") for one in others]
    return places


def _of_class(name: str, label: int, place: Path | None, further: Path | None) -> _Found:
    """Return the pictures of one class from both places."""
    samples, rejected = ([], []) if place is None else _in_place(name, label, place)
    if further is not None:
        have = {PurePosixPath(sample.source).stem for sample in samples}
        more, bad = _in_place(name, label, further)
        samples += [sample for sample in more if PurePosixPath(sample.source).stem not in have]
        rejected += bad
    return samples, rejected


def _in_place(name: str, label: int, place: Path) -> _Found:
    """Return the pictures of a class folder or tar, in the order of their names."""
    samples: list[SourceSample] = []
    rejected: list[Rejected] = []
    if place.is_dir():
        listed = [(str(file.relative_to(place)), file, file.stat().st_size, None) for file in files_below(place)]
    else:
        listed = sorted((member.name, place, member.size, member.offset) for member in scan_tar(str(place)))
    for member, file, size, offset in listed:
        source, extension = f"{name}/{member.removeprefix('./')}", PurePosixPath(member).suffix[1:].lower()
        if extension not in IMAGE_EXTENSIONS:
            rejected.append(Rejected(source, f"not a picture by its extension {PurePosixPath(member).suffix!r}"))
        else:
            samples.append(SourceSample(source, label, extension, size, file=file, offset=offset))
    return samples, rejected
