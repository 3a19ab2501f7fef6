"""Checkpoints on disk: layout, manifest, verification, the newest valid one.

    checkpoints/step_00000100/manifest.json           what, when, by whom; size and SHA-256 of every file
                             /rank_00000.safetensors  flat fp32 tensors `fp32`, `exp_avg`, `exp_avg_sq` (`ema`),
                                                      `frozen`; `rng.*`; rank 0 also `buffer.*`
    checkpoints/published.jsonl                       what was published and read back, to notice what vanished

A file holds what its rank owned: ranges of flattened parameters, listed in the manifest's table as
[name, numel, start, count, offset in the flat tensors]. The same ranges can be read at any world size and ZeRO
stage. A folder gets its final name only when every file and the manifest are on disk. No pickle is involved.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvit.distributed import RankInfo, broadcast_object, gather_objects, logger, together
from mvit.fragments import EMA

FORMAT = "mvit-ranges-2"
_NAME = re.compile(r"step_(\d{8,})")
_PIECE = 1 << 23  # bytes read at once


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
    created: str = ""
    score: float | None = None
    """The evaluation's figure of merit at this step, if there was one."""
    buffers: tuple[str, ...] = ()
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    """{state: {parameter: mvit.fingerprint}} of every trained parameter."""
    held: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    """{(parameter, state): all of it, flat} of what stands in for the files' (see `mvit.checkpoint_resize`)."""

    @property
    def trained(self) -> set[str]:
        """The parameters that are not frozen."""
        return {name for file in self.files for name, *_ in file["table"]}

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files)

    @property
    def has_ema(self) -> bool:
        holding = [file for file in self.files if file["table"]]  # a rank may own nothing
        return bool(holding) and all(EMA in file["states"] for file in holding)


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
    for entry in raw["files"]:
        if Path(entry["file"]).name != entry["file"]:
            raise CheckpointError(f"{file}: the file name {entry['file']!r} leads out of the checkpoint")
    check_tiling(raw["files"], raw["shapes"])
    return Manifest(
        path=path,
        step=raw["step"],
        world_size=raw["world_size"],
        files=tuple(raw["files"]),
        shapes=raw["shapes"],
        groups=tuple(raw["groups"]),
        state=raw["state"],
        created=raw.get("created", ""),
        score=raw.get("score"),
        buffers=tuple(raw.get("buffers", ())),
        fingerprints=raw.get("fingerprints", {}),
    )


def seal(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as JSON text with its own SHA-256 in it, so that a flipped bit there is noticed, too."""
    plain = json.loads(json.dumps(manifest))  # as a reader will see it
    return json.dumps(plain | {"sha256": _digest(plain)})


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path, *, from_disk: bool = False, give_up: Callable[[], bool] | None = None) -> str | None:
    """Return a file's SHA-256 in hexadecimal, or None if `give_up` became true on the way.

    `from_disk` drops the file from the page cache first, where the system can, so that the medium itself is read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(_PIECE):
            if give_up is not None and give_up():
                return None
            digest.update(piece)
    return digest.hexdigest()


def verify(
    path: Path, *, share: tuple[int, int] = (0, 1), progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Compare a checkpoint's files with its manifest, byte for byte; returns the problems found.

    `share` = (i, n) checks every n-th file from the i-th, so that n ranks verify a checkpoint together. `progress` is
    called with the files done and their number.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    files = manifest.files[share[0] :: share[1]]
    for done, entry in enumerate(files, start=1):
        file = path / entry["file"]
        try:
            with open(file, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
            if size != entry["bytes"]:
                problems.append(f"{file}: {size} bytes, the manifest says {entry['bytes']}")
            elif file_sha256(file) != entry["sha256"]:
                problems.append(f"{file}: content differs from its SHA-256 in the manifest")
        except OSError as error:  # missing, unreadable, or a bad sector: an older checkpoint may still be whole
            problems.append(f"{file}: cannot be read: {error.strerror}")
        if progress is not None:
            progress(done, len(files))
    return problems


def newest_valid(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose every byte verifies; None if the run never published one.

    Damaged and vanished checkpoints are reported through the log. Raises CheckpointError if checkpoints were
    published but none is usable: training from step 0 again is for the user to decide.
    """
    return _newest_valid(run_dir, list_steps(run_dir), _published_steps(run_dir), verify)


def newest_valid_on_all_ranks(run_dir: Path, ranks: RankInfo) -> Path | None:
    """Agree on what `newest_valid` returns, each rank verifying its share of the files (collective)."""

    def together_verified(path: Path) -> list[str]:
        found = gather_objects(verify(path, share=(ranks.rank, ranks.world_size)))
        return sorted({problem for problems in found for problem in problems})

    # Rank 0's view of the folder decides: on a network file system another rank may see it a moment later.
    seen: list[tuple[list[int], list[int]]] = []
    together(
        lambda: seen.append((list_steps(run_dir), _published_steps(run_dir))),
        f"reading {checkpoints_dir(run_dir)}",
        here=ranks.is_main,
    )
    steps, published = broadcast_object(seen[0] if ranks.is_main else None)
    return _newest_valid(run_dir, steps, published, together_verified, tell=ranks.is_main)


def _newest_valid(
    run_dir: Path,
    steps: Sequence[int],
    published: Sequence[int],
    check: Callable[[Path], list[str]],
    *,
    tell: bool = True,
) -> Path | None:
    level = logging.WARNING if tell else logging.DEBUG
    if published and published[-1] not in steps:
        logger.log(level, "the checkpoint of step %d was published in %s and is gone", published[-1], run_dir)
    for step in reversed(steps):
        path = checkpoint_path(run_dir, step)
        problems = check(path)
        if not problems:
            return path
        told = "; ".join(problems)
        logger.log(level, "the checkpoint of step %d is damaged, trying an older one: %s", step, told)
    if published or steps:
        raise CheckpointError(
            f"{checkpoints_dir(run_dir)}: checkpoints were saved but none is usable (see the warnings); restore one "
            "from a backup, or start again under another `name`"
        )
    return None


def record_publication(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Note in the folder of all checkpoints that one was published."""
    size = sum(file["bytes"] for file in manifest["files"])
    line = {key: manifest.get(key) for key in ("step", "created", "score")} | {"bytes": size}
    _append_line(folder / "published.jsonl", line)


def record_verification(run_dir: Path, step: int) -> None:
    """Note that the published checkpoint of `step` was read back whole from disk."""
    try:
        _append_line(checkpoints_dir(run_dir) / "published.jsonl", {"step": step, "read_back": True})
    except OSError as error:
        logger.warning("the checkpoint of step %d was read back, but this is not noted: %s", step, error)


def _append_line(file: Path, line: Mapping[str, Any]) -> None:
    with open(file, "ab+") as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":  # a kill cut the last line short: it must not take this one with it
                handle.write(b"\n")
        handle.write(json.dumps(line).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def publications(run_dir: Path) -> list[dict[str, Any]]:
    """Return what was published, oldest first: step, created, score, bytes, and whether it was read back whole."""
    file = checkpoints_dir(run_dir) / "published.jsonl"
    if not file.is_file():
        return []
    found: list[dict[str, Any]] = []
    for text in file.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: unreadable line %r", file, text)
            continue
        if not line.get("read_back"):
            found.append(line | {"read_back": False})
        elif found and found[-1]["step"] == step:
            found[-1]["read_back"] = True
    return found


def _published_steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in publications(run_dir)]


def check_tiling(files: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless the ranges of all files cover every parameter exactly once."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for file in files:
        for name, _, start, count, _ in (*file["table"], *file.get("frozen", ())):
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


def predicted_bytes(num_parameters: int, *, ema: bool, num_moments: int = 2) -> int:
    """Return the size of one checkpoint over all ranks."""
    return num_parameters * 4 * (1 + num_moments + ema)


def check_space(run_dir: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of `run_dir` has no room for one checkpoint of `needed` bytes."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise CheckpointError(
            f"{run_dir}: one checkpoint takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            "free some space or set output_dir to another file system"
        )
