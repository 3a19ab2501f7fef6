"""Checkpoints on disk: layout, manifest, verification, the newest valid one, retention.

    checkpoints/step_00000100/manifest.json           what, when, by whom; size and SHA-256 of every file
                             /rank_00000.safetensors  flat fp32 tensors `fp32`, `exp_avg`, `exp_avg_sq` (`ema`), RNG
    checkpoints/published.jsonl                       one line per published step, to notice one that vanished

A file holds what its rank owned: ranges of flattened parameters, listed in the manifest's table as
[name, numel, start, count, offset in the flat tensors]. The same ranges can be read at any world size and ZeRO
stage. A folder gets its final name only when every file and the manifest are on disk. No pickle is involved.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvit.distributed import RankInfo, broadcast_object, gather_objects, logger
from mvit.fragments import EMA

FORMAT = "mvit-ranges-1"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the run; the message names the file and the way out."""


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds."""

    path: Path
    step: int
    world_size: int
    files: tuple[dict[str, Any], ...]
    shapes: dict[str, list[int]]
    groups: tuple[dict[str, Any], ...]
    state: dict[str, Any]
    """What the trainer stored besides tensors: counters, data cursor, resolved config."""

    @property
    def has_ema(self) -> bool:
        return all(EMA in file["states"] for file in self.files)


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps of all published checkpoints, oldest first; nothing is verified."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of one checkpoint."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}"


def read_manifest(path: Path) -> Manifest:
    """Read and check one checkpoint's manifest; raises CheckpointError."""
    file = path / "manifest.json"
    try:
        raw = json.loads(file.read_text())
        found, own = raw["format"], raw.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error!r}") from error
    if found != FORMAT:
        raise CheckpointError(f"{file}: format {found!r} is not {FORMAT!r}, which this version reads")
    if own != _digest(raw):
        raise CheckpointError(f"{file}: content differs from the SHA-256 it carries")
    check_tiling(raw["files"], raw["shapes"])
    return Manifest(
        path=path,
        step=raw["step"],
        world_size=raw["world_size"],
        files=tuple(raw["files"]),
        shapes=raw["shapes"],
        groups=tuple(raw["groups"]),
        state=raw["state"],
    )


def seal(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as JSON text with its own SHA-256 in it, so that a flipped bit there is noticed, too."""
    plain = json.loads(json.dumps(manifest))  # as a reader will see it
    return json.dumps(plain | {"sha256": _digest(plain)})


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Compare a checkpoint's files with its manifest, byte for byte; returns the problems found.

    `share` = (i, n) checks every n-th file from the i-th, so that n ranks verify a checkpoint together.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for entry in manifest.files[share[0] :: share[1]]:
        file = path / entry["file"]
        try:
            with open(file, "rb") as handle:
                size = file.stat().st_size
                if size != entry["bytes"]:
                    problems.append(f"{file}: {size} bytes, the manifest says {entry['bytes']}")
                elif hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                    problems.append(f"{file}: content differs from its SHA-256 in the manifest")
        except OSError as error:  # missing, unreadable, or a bad sector: an older checkpoint may still be whole
            problems.append(f"{file}: cannot be read: {error.strerror}")
    return problems


def newest_valid(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose every byte verifies; None if the run never published one.

    Damaged and vanished checkpoints are reported through the log. Raises CheckpointError if checkpoints were
    published but none is usable: training from step 0 again is for the user to decide.
    """
    return _newest_valid(run_dir, list_steps(run_dir), _published_steps(run_dir), verify)


def newest_valid_on_all_ranks(run_dir: Path, ranks: RankInfo) -> Path | None:
    """Agree on what `newest_valid` returns, each rank verifying its share of the files (collective)."""

    def together(path: Path) -> list[str]:
        found = gather_objects(verify(path, share=(ranks.rank, ranks.world_size)))
        return sorted({problem for problems in found for problem in problems})

    # Rank 0's view of the folder decides: on a network file system another rank may see it a moment later.
    seen = (list_steps(run_dir), _published_steps(run_dir)) if ranks.is_main else None
    steps, published = broadcast_object(seen)
    return _newest_valid(run_dir, steps, published, together)


def _newest_valid(
    run_dir: Path, steps: Sequence[int], published: Sequence[int], check: Callable[[Path], list[str]]
) -> Path | None:
    if published and published[-1] not in steps:
        logger.warning("the checkpoint of step %d was published in %s and is gone", published[-1], run_dir)
    for step in reversed(steps):
        path = checkpoint_path(run_dir, step)
        problems = check(path)
        if not problems:
            return path
        logger.warning("the checkpoint of step %d is damaged, trying an older one: %s", step, "; ".join(problems))
    if published or steps:
        raise CheckpointError(
            f"{checkpoints_dir(run_dir)}: checkpoints were saved but none is usable (see the warnings); restore one "
            "from a backup, or start again under another `name`"
        )
    return None


def _published_steps(run_dir: Path) -> list[int]:
    file = checkpoints_dir(run_dir) / "published.jsonl"
    if not file.is_file():
        return []
    steps = []
    for line in file.read_text().splitlines():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError):
            logger.warning("%s: unreadable line %r", file, line)
    return steps


def check_tiling(files: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless the ranges of all files cover every parameter exactly once."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for file in files:
        for name, _, start, count, _ in file["table"]:
            if name not in ranges:
                raise CheckpointError(f"{file['file']}: holds the unknown parameter {name}")
            ranges[name].append((start, start + count))
    for name, shape in shapes.items():
        position, numel = 0, torch.Size(shape).numel()
        for start, stop in sorted(ranges[name]):
            if start != position:
                raise CheckpointError(f"{name}: elements {position} to {start} are missing or stored twice")
            position = stop
        if position != numel:
            raise CheckpointError(f"{name}: {position} of {numel} elements are stored")


def prune(run_dir: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Remove all but the `keep_last` newest checkpoints up to step `newest` and the multiples of `keep_every`.

    What cannot be removed is reported and stays: the new checkpoint is published, so nothing has failed.
    """
    # Beyond the one just published lie only damaged ones that the run has fallen back from: they must not count as
    # the newest, or the good ones would go. They are replaced when the run comes to their step again.
    steps = [step for step in list_steps(run_dir) if step <= newest]
    for step in steps[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            path = checkpoint_path(run_dir, step)
            try:
                path.rename(path.with_name(f".{path.name}.old"))  # no half-deleted folder keeps a checkpoint's name
            except OSError as error:
                logger.warning("the old checkpoint %s cannot be removed: %s", path, error)
    for leftover in checkpoints_dir(run_dir).glob(".step_*"):  # these, replaced ones, and of attempts that died saving
        shutil.rmtree(leftover, ignore_errors=True)


def predicted_bytes(num_parameters: int, *, ema: bool) -> int:
    """Return the size of one checkpoint over all ranks."""
    return num_parameters * 4 * (4 if ema else 3)


def check_space(run_dir: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of `run_dir` has no room for one checkpoint of `needed` bytes."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise CheckpointError(
            f"{run_dir}: one checkpoint takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            "free some space or set output_dir to another file system"
        )
