"""What a model's classes are called: from a file, or from the manifest of the data it was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import read_manifest
from data_pipeline.sources.video_lists import read_class_names
from data_pipeline.transfer import is_remote
from mvit.config import ConfigError, RunConfig


@dataclass(frozen=True)
class ClassNames:
    """The names of all classes, in the order of the labels, and where they are from."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """Of the source's categories, for COCO's results; label + 1 where the source is not known."""
    origin: str
    """In words: "data/coco/train", or "numbers, since …"."""


def class_names(config: RunConfig, names_file: str | Path | None = None) -> ClassNames:
    """Name a recipe's classes: by `names_file`, else by the packed folder that `data.train` names, else by numbers.

    The file is a text with one name a line, or JSON: a list, or an object name → number. Raises ValueError if it has
    another number of names than the model has classes, OSError if it cannot be read.
    """
    number = config.model.num_classes
    found, reason = _trained_on(config)
    ids = tuple(range(1, number + 1))
    if found is not None and "categories" in found:
        ids = tuple(int(category["id"]) for category in found["categories"])
    if names_file is not None:
        names = tuple(read_class_names(Path(names_file)))
        if len(names) != number:
            raise ConfigError(
                f"{names_file}: has {len(names)} class names, the model has {number} classes; list one name for each, "
                "in the order of the labels"
            )
        return ClassNames(names, ids, str(names_file))
    if found is None:
        return ClassNames(tuple(map(str, range(number))), ids, f"numbers, since {reason}; --names FILE names them")
    return ClassNames(tuple(map(str, found["class_names"])), ids, reason)


def _trained_on(config: RunConfig) -> tuple[dict[str, Any] | None, str]:
    """Return the manifest that fits the model and where it lies, or None and the reason."""
    spec, number = config.data.train, config.model.num_classes
    if spec is None:
        return None, "the recipe names no training data"
    for place in [spec] if isinstance(spec, str) else spec:
        manifest = None if is_remote(place) else read_manifest(place.removeprefix("file://").removeprefix("file:"))
        if manifest is None:
            continue
        if len(manifest["class_names"]) != number:
            return None, f"{place} has {len(manifest['class_names'])} classes, the model {number}"
        return manifest, place
    return None, f"data.train = {spec} is no packed folder here"
