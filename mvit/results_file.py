"""The file that an evaluation writes beside its figures: tried before the work, then replaced whole."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvit.config import ConfigError

_SUFFIX = ".json"


def check_results_file(path: Path) -> None:
    """Make the file's folder and try to write there; an evaluation of hours must not end with nothing.

    Raises ConfigError if the name is not that of a JSON file: it might be the weights', and is replaced. OSError if
    the folder cannot be written.
    """
    if path.suffix != _SUFFIX or path.is_dir():
        raise ConfigError(f"results file {path}: it is replaced if it exists, so its name must end in {_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    part.write_text("[]")
    part.unlink()


def write_results_file(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as one JSON list; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    part.write_text(json.dumps(rows))
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
