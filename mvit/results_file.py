"""The files that an evaluation writes beside its figures: tried before the work, then replaced whole."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit.config import ConfigError

if TYPE_CHECKING:
    from mvit.given_labels import GivenLabels

_SUFFIXES = {"results": ".json", "per_class": ".csv", "confusion": ".png"}


@dataclass(frozen=True)
class Reports:
    """What an evaluation is asked for beside its figures; None is not written."""

    results: Path | None = None
    """What was predicted, as JSON."""
    per_class: Path | None = None
    """A table with a row for each class, as CSV."""
    confusion: Path | None = None
    """A picture of which classes are taken for which, as PNG; classifiers only."""
    labels: "GivenLabels | None" = None
    """Judge by these labels, too, or instead of the shards'; classifiers only."""

    def files(self) -> dict[str, Path]:
        """Return option → file of those asked for."""
        found = {name: getattr(self, name) for name in _SUFFIXES}
        return {name: path for name, path in found.items() if path is not None}


def check_reports(reports: Reports) -> None:
    """Make the files' folders and try to write there; an evaluation of hours must not end with nothing.

    Raises ConfigError if a name has not the suffix of its kind: it might be the weights', and is replaced. OSError if
    a folder cannot be written.
    """
    for name, path in reports.files().items():
        if path.suffix != _SUFFIXES[name] or path.is_dir():
            raise ConfigError(
                f"{name} file {path}: it is replaced if it exists, so its name must end in {_SUFFIXES[name]}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        part.write_text("[]")
        part.unlink()


def write_results_file(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as one JSON list; raises OSError."""
    write_whole(path, json.dumps(rows).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    part.write_bytes(content)
    part.replace(path)


def part_of(path: Path) -> Path:
    """Return the name that a file has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
