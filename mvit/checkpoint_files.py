"""The files of one checkpoint: a rank's shard, the manifest over all of them, and the publish.

Nothing here talks to other ranks; mvit/checkpoint_save.py says who writes what, and when.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvit.checkpoint import FORMAT, CheckpointError, check_tiling, record_publication, seal
from mvit.distributed import logger
from mvit.fingerprint import to_hex
from mvit.fragments import FROZEN, MASTER, Fragment
from mvit.safetensors_file import write_pieces


@dataclass(frozen=True)
class Contents:
    """Everything a checkpoint holds; `fragments`, `rng` and `buffers` are this rank's, the rest is the same on all."""

    fragments: Sequence[Fragment]
    shapes: Mapping[str, Sequence[int]]
    """Of every parameter, frozen ones included."""
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]
    """JSON-able: counters, data cursor, resolved config."""
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    score: float | None = None
    """The evaluation's figure of merit at this step, higher is better; retention keeps the best."""


def at_point(name: str) -> None:
    """Do nothing. Called wherever a save has just touched the disk; tests replace it to kill the process there."""


def write_shard(path: Path, fragments: Sequence[Fragment], small: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one rank's file durably and return its manifest entry; `small` are tensors beside the fragments."""
    trained, frozen = ([f for f in fragments if f.frozen == is_frozen] for is_frozen in (False, True))
    columns = {state: [f.states[state] for f in trained] for state in (trained[0].states if trained else ())}
    if frozen:
        columns[FROZEN] = [f.states[MASTER] for f in frozen]
    layout = {key: (torch.float32, [sum(len(view) for view in views)]) for key, views in columns.items()}
    layout |= {key: (tensor.dtype, list(tensor.shape)) for key, tensor in small.items()}
    at_point("shard begun")
    written = write_pieces(path, layout, chain(_pieces(columns), small.values()))
    at_point("shard synced")
    return {
        "file": path.name,
        "bytes": written.num_bytes,
        "sha256": written.sha256,
        "states": [state for state in columns if state != FROZEN],
        "table": _table(trained),
        "frozen": _table(frozen),
    }


def _pieces(columns: Mapping[str, Sequence[Tensor]]) -> Iterator[Tensor]:
    for views in columns.values():
        for view in views:
            yield view.float().cpu()
            at_point("piece written")


def _table(fragments: Sequence[Fragment]) -> list[list[Any]]:
    rows, offset = [], 0
    for f in fragments:
        rows.append([f.name, f.numel, f.start, f.count, offset])
        offset += f.count
    return rows


def build_manifest(
    step: int, contents: Contents, entries: Sequence[Mapping[str, Any]], sums: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Any]:
    """Put all ranks' entries together; raises CheckpointError unless their ranges cover every parameter once.

    `sums` are the ranks' shares of the fingerprints: {state: one number a parameter}.
    """
    shapes = {name: list(shape) for name, shape in contents.shapes.items()}
    check_tiling(entries, shapes)
    trained = {name for entry in entries for name, *_ in entry["table"]}
    prints: dict[str, dict[str, str]] = {}
    for state in {state: None for own in sums for state in own}:
        shares = [torch.tensor(own[state], dtype=torch.int64) for own in sums if state in own]
        whole = to_hex(list(shapes), torch.stack(shares).sum(0))  # wraps around: modulo 2^64
        prints[state] = {name: value for name, value in whole.items() if name in trained}
    return {
        "format": FORMAT,
        "step": step,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": len(entries),
        "shapes": shapes,
        "groups": list(contents.groups),
        "state": dict(contents.state),
        "score": contents.score,
        "buffers": sorted(contents.buffers),
        "fingerprints": prints,
        "files": list(entries),
    }


def publish(
    part: Path, target: Path, manifest: Mapping[str, Any], check_owner: Callable[[], None] = lambda: None
) -> None:
    """Give a complete folder its name; what had the name before is moved aside first.

    Raises CheckpointError if a rank's file is not there any more: another life of the job may have cleared it away.
    `check_owner` raises if one has taken over; it is asked last, where nothing but a rename is left to do.
    """
    for entry in manifest["files"]:
        file = part / entry["file"]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file}: gone or not whole; does another job write into this run?")
    with open(part / "manifest.json", "w") as file:
        file.write(seal(manifest))
        at_point("manifest written")
        file.flush()
        os.fsync(file.fileno())
    _fsync_dir(part)
    at_point("manifest synced")
    old = part.with_suffix(".old")
    check_owner()
    if target.exists():  # a damaged one of the same step, or a step run again after a fall-back
        target.rename(old)
        at_point("old one moved aside")
    try:
        part.rename(target)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    at_point("renamed")
    shutil.rmtree(old, ignore_errors=True)
    try:
        _fsync_dir(target.parent)
        record_publication(target.parent, manifest)
    except OSError as error:  # the checkpoint has its name and is whole
        logger.warning("the checkpoint of step %d is saved, but not listed: %s", manifest["step"], error)
    at_point("listed")


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
