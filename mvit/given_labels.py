"""Labels from a file to judge an evaluation by: ImageNet-ReaL's sets, another numbering of classes (ImageNet-V2)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.shards import ShardSet
from data_pipeline.source_names import source_names
from mvit.config import ConfigError

_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")  # its place in the validation set, from 1


@dataclass(frozen=True)
class GivenLabels:
    """The classes that count as right for each sample, in the order of the shards."""

    accepted: Tensor
    """(N, M) int64, filled up with -1; a row of these alone: the sample does not count."""
    replace: bool
    """Whether each sample has one class, which stands for the shards' label in all figures and files."""
    origin: str

    def of(self, sample_ids: Tensor) -> Tensor:
        """Return the rows (B, M) of samples, on their device; of padding (-1) any."""
        return self.accepted.to(sample_ids.device)[sample_ids.clamp(min=0)]


def read_labels(path: str | Path, shards: ShardSet, num_classes: int) -> GivenLabels:
    """Read a JSON file of labels for the samples of `shards`.

    A list has one entry a picture, in the order of the file names, as ReaL's real.json has: the right classes, or one.
    An object has for each class of the shards, by its name or number, the model's class; or for each picture, by its
    file name, the right classes, or one. Raises ConfigError for a file that does not fit, OSError if it cannot be read.
    """
    try:
        content: Any = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"labels {path}: not JSON ({error}); expected a list or an object") from None
    if isinstance(content, list):
        entries = _in_order(path, content, source_names(shards))
    elif isinstance(content, Mapping):
        entries = _by_name(path, content, shards)
    else:
        raise ConfigError(f"labels {path}: a {type(content).__name__}; expected a list or an object")
    rows = [_classes(path, entry, num_classes) for entry in entries]
    width = max(map(len, rows), default=1)
    accepted = torch.full((len(rows), max(1, width)), -1, dtype=torch.int64)
    for place, row in enumerate(rows):
        accepted[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return GivenLabels(accepted, all(isinstance(entry, int) for entry in entries), str(path))


def _in_order(path: str | Path, content: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Take the entries of a list to the samples: by ImageNet's validation numbers, else by the order of the names."""
    numbers = [found and int(found[1]) for found in map(_VALIDATION_NUMBER.search, names)]
    if all(numbers) and max(filter(None, numbers), default=0) <= len(content):
        return [content[number - 1] for number in numbers if number]
    if len(content) != len(names) or len(set(names)) != len(names):
        raise ConfigError(
            f"labels {path}: has {len(content)} entries for {len(names)} samples ({len(set(names))} file names); give "
            "one for each, in the order of the file names, or an object file name → classes"
        )
    places = {name: place for place, name in enumerate(sorted(names))}
    return [content[places[name]] for name in names]


def _by_name(path: str | Path, content: Mapping[str, Any], shards: ShardSet) -> list[Any]:
    """Take the entries of an object to the samples: by the shards' classes, else by file names."""
    numbers = [shards.label(sample) for sample in range(len(shards))]
    present = sorted(set(numbers))
    called = shards.class_names or ()
    for names in ({label: called[label] for label in present if label < len(called)}, {n: str(n) for n in present}):
        if len(names) == len(present) and all(name in content for name in names.values()):
            return [content[names[number]] for number in numbers]
    files = source_names(shards)
    stems = [name if name in content else name.rsplit(".", 1)[0] for name in files]
    lost = [name for name in stems if name not in content]
    if lost:
        raise ConfigError(
            f"labels {path}: has neither all {len(present)} classes of the shards, by name or number, nor all files: "
            f"{len(lost)} of {len(files)} are not in it, {lost[0]} for one"
        )
    return [content[name] for name in stems]


def _classes(path: str | Path, entry: Any, num_classes: int) -> list[int]:
    found = entry if isinstance(entry, list) else [entry]
    for one in found:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < num_classes:
            raise ConfigError(f"labels {path}: {one!r} is no class of the model, whose are 0 to {num_classes - 1}")
    return found
