"""Writing a checkpoint: every rank its file, then one atomic publish."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mvit.checkpoint import FORMAT, CheckpointError, check_tiling, checkpoint_path, checkpoints_dir, prune, seal
from mvit.distributed import RankInfo, broadcast_object, gather_objects, logger
from mvit.fragments import MASTER, MOMENTS, Fragment


class SaveError(RuntimeError):
    """A save that did not succeed on every rank; nothing was published."""


def save(
    run_dir: Path,
    step: int,
    fragments: Sequence[Fragment],
    *,
    shapes: Mapping[str, Sequence[int]],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    ranks: RankInfo,
    keep_last: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write and publish the checkpoint of `step` (collective); returns its folder.

    Raises SaveError on every rank if any rank failed; then nothing is published and nothing older is touched.
    """
    folder = checkpoints_dir(run_dir)
    target = checkpoint_path(run_dir, step)
    part = folder / f".{target.name}.{broadcast_object(uuid.uuid4().hex[:8])}.tmp"
    entry, error = None, None
    try:
        part.mkdir(parents=True, exist_ok=True)
        own = [f.part(ranks.rank, ranks.world_size) for f in fragments]
        entry = _write_rank(part / f"rank_{ranks.rank:05d}.safetensors", [f for f in own if f.count], rng)
    except (OSError, SafetensorError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    results = gather_objects((entry, error))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(results) if text]
    if not failures and ranks.is_main:
        manifest = {
            "format": FORMAT,
            "step": step,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": ranks.world_size,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "groups": list(groups),
            "state": dict(state),
            "files": [entry for entry, _ in results],
        }
        try:
            check_tiling(manifest["files"], manifest["shapes"])
            _publish(part, target, manifest)
            prune(run_dir, step, keep_last, keep_every)
        except (OSError, CheckpointError) as caught:
            failures = [f"rank 0: {type(caught).__name__}: {caught}"]
    failures = broadcast_object(failures)
    if failures:
        if ranks.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise SaveError(
            f"the checkpoint of step {step} was not saved ({'; '.join(failures)}); "
            f"older checkpoints in {folder} are untouched"
        )
    return target


def _write_rank(path: Path, fragments: Sequence[Fragment], rng: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one rank's file durably and return its manifest entry."""
    states = list(fragments[0].states) if fragments else [MASTER, *MOMENTS]
    tensors: dict[str, Tensor] = {}
    for key in states:
        views = [f.states[key].detach() for f in fragments]
        tensors[key] = torch.cat(views).cpu() if views else torch.zeros(0)
    table, offset = [], 0
    for f in fragments:
        table.append([f.name, f.numel, f.start, f.count, offset])
        offset += f.count
    save_file(tensors | {f"rng.{key}": value for key, value in rng.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": digest, "states": states, "table": table}


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(part: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    with open(part / "manifest.json", "w") as file:
        file.write(seal(manifest))
        file.flush()
        os.fsync(file.fileno())
    _fsync_dir(part)
    if target.exists():  # a damaged one of the same step, or a step run again after a fall-back
        target.rename(part.with_suffix(".old"))  # `prune` removes it
    part.rename(target)
    try:
        with open(target.parent / "published.jsonl", "a") as file:
            file.write(json.dumps({"step": manifest["step"], "created": manifest["created"]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the checkpoint has its name and is whole
        logger.warning("the checkpoint of step %d is saved, but not listed: %s", manifest["step"], error)
    _fsync_dir(target.parent)
