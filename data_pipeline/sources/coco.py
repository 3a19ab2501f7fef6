"""COCO data sets: pictures in a folder or a tar, and a JSON with their objects; what breaks a rule is named.

The JSON is read whole, which takes several times its size of memory. The pictures stay where they are until they are
packed.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.annotations import (
    ANNOTATIONS_EXTENSION,
    AnnotatedPicture,
    Annotation,
    is_id,
    object_area,
    object_problem,
    write_annotations,
)
from data_pipeline.decode import IMAGE_EXTENSIONS
from data_pipeline.sources import Rejected, SourceData, SourceSample
from data_pipeline.tar_scan import Member, scan_tar

RULE = "the source's own splits"


class CocoError(ValueError):
    """A JSON that is no COCO data set, or pictures that cannot be looked for; the message names file and way out."""


@dataclass
class _Split:
    """What is found of one split."""

    samples: list[SourceSample] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    dropped: list[Rejected] = field(default_factory=list)


def read_coco(sets: Mapping[str, tuple[Path, Path]]) -> SourceData:
    """List the pictures of split → (folder or tar, JSON) with the objects that keep the rules, without decoding them.

    What breaks a rule is in `rejected` (pictures) and `dropped` (objects), with id, value and rule. Classes are
    numbered in the order of the category ids. Raises CocoError for a JSON without images, annotations and categories,
    and for splits with different categories.
    """
    splits: dict[str, _Split] = {}
    categories: list[dict[str, Any]] = []
    for name, (images, path) in sets.items():
        content = _load(path)
        found = _categories(content["categories"], path)
        if splits and found != categories:
            raise CocoError(f"{path} has other categories than {next(iter(sets.values()))[1]}; pack them separately.")
        categories = found
        labels = {category["id"]: label for label, category in enumerate(categories)}
        splits[name] = _read_split(content, _finder(images), labels)
    return SourceData(
        origin="coco: " + ", ".join(str(path) for _, path in sets.values()),
        class_names=[category["name"] for category in categories],
        splits={name: split.samples for name, split in splits.items()},
        rule=RULE,
        rejected={name: split.rejected for name, split in splits.items()},
        dropped={name: split.dropped for name, split in splits.items()},
        facts={"categories": categories},
    )


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CocoError(f"{path} cannot be read as JSON: {error}.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise CocoError(
                f"{path} is no COCO data set: it has no list {key!r} (wanted: images, annotations, categories)."
            )
    return content


def _categories(found: list[Any], path: Path) -> list[dict[str, Any]]:
    """Return the categories in the order of their ids."""
    categories = []
    for number, category in enumerate(found):
        identity = _whole(category.get("id")) if isinstance(category, dict) else None
        if identity is None or not isinstance(category.get("name"), str):
            raise CocoError(f"{path}: category number {number} is {category!r}; it needs a whole id and a name.")
        above = {"supercategory": category["supercategory"]} if "supercategory" in category else {}
        categories.append({"id": identity, "name": category["name"], **above})
    if not categories:
        raise CocoError(f"{path} lists no category.")
    for key in ("id", "name"):
        value, number = Counter(category[key] for category in categories).most_common(1)[0]
        if number > 1:
            raise CocoError(f"{path}: {number} categories have the {key} {value!r}; it must be unique.")
    return sorted(categories, key=lambda category: category["id"])


def _read_split(content: dict[str, list[Any]], finder: "_Folder | _Tar", labels: Mapping[int, int]) -> _Split:
    split = _Split()
    pictures: dict[int, tuple[AnnotatedPicture, SourceSample]] = {}
    bad: dict[int, int] = {}  # id of a picture that is left out → its place in `rejected`
    files: dict[str, int] = {}
    for number, image in enumerate(content["images"]):
        picture = _picture(image)
        if isinstance(picture, str):
            split.rejected.append(Rejected(_image_name(image, number), picture))
            if (identity := _identity(image)) is not None:
                bad.setdefault(identity, len(split.rejected) - 1)
            continue
        source: SourceSample | str
        if picture.image_id in pictures or picture.image_id in bad:
            source = f"image id {picture.image_id} occurs more than once: the later ones are left out"
        elif picture.file_name in files:
            source = f"image {files[picture.file_name]} has the same file_name"
        else:
            source = finder.find(picture.file_name)
        if isinstance(source, str):
            split.rejected.append(Rejected(_image_name(image, number), source))
            if picture.image_id not in pictures:
                bad.setdefault(picture.image_id, len(split.rejected) - 1)
            continue
        files[picture.file_name] = picture.image_id
        pictures[picture.image_id] = picture, source
    objects = _objects(
        content["annotations"], {key: picture for key, (picture, _) in pictures.items()}, bad, labels, split
    )
    for key, (picture, source) in pictures.items():
        whole = AnnotatedPicture(key, picture.file_name, picture.height, picture.width, tuple(objects[key]))
        members = {ANNOTATIONS_EXTENSION: write_annotations(whole)}
        split.samples.append(
            SourceSample(source.source, None, source.extension, source.size, source.file, None, source.offset, members)
        )
    return split


def _picture(image: Any) -> AnnotatedPicture | str:
    """Return an entry of `images` without its objects, or what is wrong with it."""
    if not isinstance(image, dict):
        return "it is no object with id, file_name, height and width"
    identity, name = _identity(image), image.get("file_name")
    if identity is None:
        return f"id {image.get('id')!r}: it must be a whole number of at most 64 bits"
    if not isinstance(name, str) or not name:
        return f"file_name {name!r}: it must be a text"
    height, width = _whole(image.get("height")), _whole(image.get("width"))
    if height is None or width is None or min(height, width) < 1:
        return f"height {image.get('height')!r}, width {image.get('width')!r}: they must be whole numbers above 0"
    if PurePosixPath(name).suffix[1:].lower() not in IMAGE_EXTENSIONS:
        return f"file_name {name!r} is no picture by its extension; known: {', '.join(IMAGE_EXTENSIONS)}"
    return AnnotatedPicture(identity, name, height, width, ())


def _objects(
    annotations: list[Any],
    pictures: Mapping[int, AnnotatedPicture],
    bad: Mapping[int, int],
    labels: Mapping[int, int],
    split: _Split,
) -> defaultdict[int, list[Annotation]]:
    """Return the objects of each picture by its id, and note what breaks a rule."""
    objects: defaultdict[int, list[Annotation]] = defaultdict(list)
    gone: Counter[int] = Counter()
    seen: set[int] = set()
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            split.dropped.append(Rejected(f"annotations[{number}]", f"{annotation!r} is no annotation"))
            continue
        identity, image_id = _identity(annotation), _whole(annotation.get("image_id"))
        if image_id is not None and image_id in bad and image_id not in pictures:
            gone[bad[image_id]] += 1
            continue
        picture = None if image_id is None else pictures.get(image_id)
        name = f"annotation {annotation.get('id', f'number {number}')}"
        problem, category = None, _whole(annotation.get("category_id"))
        if identity is None:
            problem = f"id {annotation.get('id')!r}: it must be a whole number of at most 64 bits"
        elif identity in seen:
            problem = f"id {identity} occurs more than once: the later ones are left out"
        elif picture is None:
            problem = f"image_id {annotation.get('image_id')!r} is not among the images"
        elif category is None or category not in labels:
            problem = f"category_id {annotation.get('category_id')!r} is not among the categories"
        elif annotation.get("iscrowd", 0) not in (0, 1):
            problem = f"iscrowd {annotation['iscrowd']!r}: it must be 0 or 1"
        else:
            seen.add(identity)
            mask = annotation.get("segmentation") or None
            problem = object_problem(annotation.get("bbox"), mask, picture.height, picture.width)
            if problem is None:
                bbox = annotation["bbox"]
                area = object_area(annotation.get("area"), bbox, mask, picture.height, picture.width)
                crowd = bool(annotation.get("iscrowd", 0))
                objects[picture.image_id].append(Annotation(identity, labels[category], tuple(bbox), crowd, area, mask))
        if problem:
            where = f"{name} of {picture.file_name} (image {picture.image_id})" if picture else name
            split.dropped.append(Rejected(where, problem))
    for place, number in gone.items():
        old = split.rejected[place]
        split.rejected[place] = Rejected(old.source, f"{old.reason}; its {number} objects go with it")
    return objects


# --- finding the files ------------------------------------------------------------------------------------------


class _Folder:
    """Pictures below a folder, by their path in it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, name: str) -> SourceSample | str:
        """Return where a picture is, or why it cannot be had."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"file_name {name!r} leads out of {self._root}"
        file = self._root / name
        try:
            size = file.stat().st_size
        except OSError as error:
            return f"no such file below {self._root} ({os.strerror(error.errno or 0)})"
        except ValueError as error:  # a zero byte, or half a pair of UTF-16
            return f"file_name {name!r} can be no file's name: {error}"
        if not file.is_file():
            return f"{file} is no file"
        return SourceSample(name, None, file.suffix[1:].lower(), size, file=file)


class _Tar:
    """Pictures in a tar, by their path or by the end of it."""

    def __init__(self, tar: Path) -> None:
        self._tar = tar
        self._by_end: defaultdict[str, list[Member]] = defaultdict(list)
        for member in scan_tar(str(tar)):
            for end in _ends(member.name.removeprefix("./")):
                self._by_end[end].append(member)

    def find(self, name: str) -> SourceSample | str:
        """Return where a picture is, or why it cannot be had."""
        found = self._by_end.get(name, [])
        exact = [member for member in found if member.name.removeprefix("./") == name]
        if len(exact) != 1 and len(found) != 1:
            return f"{self._tar} has {len(found)} such files, e.g. {found[0].name}" if found else f"not in {self._tar}"
        member = (exact or found)[0]
        extension = PurePosixPath(name).suffix[1:].lower()
        return SourceSample(name, None, extension, member.size, file=self._tar, offset=member.offset)


def _finder(images: Path) -> _Folder | _Tar:
    if images.is_dir():
        return _Folder(images)
    if images.is_file():
        return _Tar(images)
    raise CocoError(f"{images} does not exist; name the folder or the tar that holds the pictures.")


def _ends(name: str) -> Iterator[str]:
    """Yield a path and what is left of it without its first folders."""
    parts = name.split("/")
    for first in range(len(parts)):
        yield "/".join(parts[first:])


def _identity(entry: Any) -> int | None:
    return _whole(entry.get("id")) if isinstance(entry, dict) else None


def _image_name(image: Any, number: int) -> str:
    if not isinstance(image, dict):
        return f"images[{number}]"
    return f"{image.get('file_name', f'images[{number}]')} (image {image.get('id')!r})"


def _whole(value: Any) -> int | None:
    """Return a whole number as an int, None for anything else; some tools write 640.0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or value in (float("inf"), -float("inf"))
    ):
        return None
    return int(value) if int(value) == value and is_id(int(value)) else None
