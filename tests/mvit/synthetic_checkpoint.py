"""Checkpoints that were never trained, written piece by piece: of any size in little memory, several ranks' files."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mvit.checkpoint import FORMAT, checkpoint_path, checkpoints_dir, seal
from mvit.config import RunConfig, parse_config
from mvit.tasks import create_task

PIECE = 1 << 20  # numbers made at once
SCALE = 0.02

DETECTOR = {
    "kind": "mask_rcnn",
    "window_size": 8,
    "pyramid_channels": 16,
    "box_features": 32,
    "mask_channels": 16,
    "proposals_before_nms_test": 50,
    "proposals_after_nms": 20,
    "score_threshold": 0.0,
    "detections_per_image": 5,
}
"""Of a detector small enough for tests, whose every find counts."""


def untrained(folder: Path, name: str = "run", image_size: tuple[int, int] = (32, 32), **model: Any) -> RunConfig:
    """Return the config of a run that consists of one checkpoint of made-up weights."""
    sizes = {"num_classes": 10, "embed_dim": 16, "depths": (1, 2, 1, 1)} | model
    config = parse_config(
        {"name": name, "output_dir": str(folder), "model": sizes, "image": {"image_size": image_size}}
    )
    write_checkpoint(config)
    return config


def write_checkpoint(config: RunConfig, step: int = 1, num_ranks: int = 3, states: tuple[str, ...] = ("fp32",)) -> Path:
    """Write a checkpoint into the config's run folder, each parameter split over all ranks; returns its folder.

    `states` may add "exp_avg", "exp_avg_sq" and "ema". The weights depend on their names alone; they keep the size of
    the activations through any number of blocks. What buffers the model has, the first rank's file holds.
    """
    with torch.device("meta"):
        model = create_task(config).build_model()
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    buffers = {name: b for name, b in sorted(model.state_dict().items()) if name not in shapes}
    folder = checkpoint_path(config.run_dir, step)
    folder.mkdir(parents=True)
    files = [_write_rank(folder, rank, num_ranks, shapes, states, {} if rank else buffers) for rank in range(num_ranks)]
    manifest = {
        "format": FORMAT,
        "step": step,
        "created": "2026-01-01T00:00:00+0000",
        "world_size": num_ranks,
        "shapes": shapes,
        "groups": [],
        "state": {"config": config.model_dump(mode="json")},
        "buffers": list(buffers),
        "files": files,
    }
    (folder / "manifest.json").write_text(seal(manifest))
    with open(checkpoints_dir(config.run_dir) / "published.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    return folder


def weight_of(name: str, shape: list[int], state: str = "fp32") -> Tensor:
    """Return a whole parameter as `write_checkpoint` writes it."""
    numel = torch.Size(shape).numel()
    return torch.cat(list(_numbers(name, state, numel, 0, numel))).view(shape)


def buffer_of(name: str, like: Tensor) -> Tensor:
    """Return a running statistic as `write_checkpoint` writes it: positive, as variances are."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(like.shape, generator=generator) * 9 + 1).to(like.dtype)


def _write_rank(
    folder: Path,
    rank: int,
    num_ranks: int,
    shapes: dict[str, list[int]],
    states: tuple[str, ...],
    buffers: dict[str, Tensor],
) -> dict[str, Any]:
    table, offset = [], 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        start, stop = (numel * r // num_ranks for r in (rank, rank + 1))
        if start < stop:
            table.append([name, numel, start, stop - start, offset])
            offset += stop - start
    header = {
        state: {"dtype": "F32", "shape": [offset], "data_offsets": [4 * offset * i, 4 * offset * (i + 1)]}
        for i, state in enumerate(states)
    }
    stop = 4 * offset * len(states)
    for name, buffer in buffers.items():
        start, stop = stop, stop + buffer.nbytes
        dtype = {torch.float32: "F32", torch.int64: "I64"}[buffer.dtype]
        header[f"buffer.{name}"] = {"dtype": dtype, "shape": list(buffer.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    path, digest = folder / f"rank_{rank:05d}.safetensors", hashlib.sha256()
    with open(path, "wb") as file:
        _put(file, digest, len(text).to_bytes(8, "little") + text)
        for state in states:
            for name, numel, start, count, _ in table:
                for piece in _numbers(name, state, numel, start, count):
                    _put(file, digest, piece.numpy().tobytes())
        for name, buffer in buffers.items():
            _put(file, digest, buffer_of(name, buffer).numpy().tobytes())
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest(), "states": list(states), "table": table}


def _put(file: IO[bytes], digest: Any, data: bytes) -> None:
    file.write(data)
    digest.update(data)


def _numbers(name: str, state: str, numel: int, start: int, count: int) -> Iterator[Tensor]:
    """Yield numbers [start, start + count) of a parameter, in pieces that do not depend on who asks."""
    generator = torch.Generator()
    center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    for index in range(start // PIECE, -(-(start + count) // PIECE)):
        generator.manual_seed(zlib.crc32(f"{name} {state} {index}".encode()))
        piece = torch.randn(min(PIECE, numel - index * PIECE), generator=generator) * SCALE + center
        yield piece[max(start - index * PIECE, 0) : start + count - index * PIECE]
