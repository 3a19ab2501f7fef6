"""Reading a checkpoint: into the live fragments of any world size and stage, or as whole weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mvit.checkpoint import CheckpointError, Manifest, read_manifest
from mvit.fragments import EMA, MASTER, Fragment


class _Reader:
    """Reads ranges of parameters out of a checkpoint's files."""

    def __init__(self, manifest: Manifest) -> None:
        self._path = manifest.path
        self._handles: dict[str, Any] = {}
        self._index: dict[str, list[tuple[int, int, int, str]]] = {}
        for file in manifest.files:
            for name, _, start, count, offset in file["table"]:
                self._index.setdefault(name, []).append((start, count, offset, file["file"]))

    def handle(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(self._path / file, "pt")
        return self._handles[file]

    def read_into(self, target: Tensor, name: str, start: int, key: str) -> None:
        """Fill the 1-D `target` with elements [start, start + len) of state `key` of parameter `name`."""
        got, stop = 0, start + target.numel()
        for at, count, offset, file in self._index[name]:
            low, high = max(start, at), min(stop, at + count)
            if low < high:
                piece = self.handle(file).get_slice(key)[offset + low - at : offset + high - at]
                target[low - start : high - start].copy_(piece)
                got += high - low
        assert got == target.numel(), name


def load_into(manifest: Manifest, fragments: Sequence[Fragment], shapes: Mapping[str, Sequence[int]]) -> None:
    """Fill the fragments' views from a checkpoint saved at any world size and stage.

    Raises CheckpointError if the model's parameters are not those of the checkpoint.
    """
    if {name: list(shape) for name, shape in shapes.items()} != manifest.shapes:
        raise CheckpointError(f"{manifest.path}: {_shape_difference(shapes, manifest.shapes)}")
    reader = _Reader(manifest)
    for fragment in fragments:
        for key, view in fragment.states.items():
            # A run that switches the average on starts it from the loaded weights.
            source = MASTER if key == EMA and not manifest.has_ema else key
            reader.read_into(view, fragment.name, fragment.start, source)


def load_rng(manifest: Manifest, rank: int) -> dict[str, Tensor]:
    """Return the random states `rank` saved; empty if the checkpoint had fewer ranks."""
    if rank >= len(manifest.files):
        return {}
    handle = _Reader(manifest).handle(manifest.files[rank]["file"])
    return {key.removeprefix("rng."): handle.get_tensor(key) for key in handle.keys() if key.startswith("rng.")}  # noqa: SIM118


def whole_weights(path: Path, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter as a whole fp32 tensor, one at a time; `ema` takes the moving average."""
    manifest = read_manifest(path)
    if ema and not manifest.has_ema:
        raise CheckpointError(f"{path}: holds no moving average; train with optim.ema_decay, or leave the option out")
    reader = _Reader(manifest)
    for name, shape in manifest.shapes.items():
        flat = torch.empty(torch.Size(shape).numel())
        reader.read_into(flat, name, 0, EMA if ema else MASTER)
        yield name, flat.view(shape)


def _shape_difference(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> str:
    told = [f"{n} is not in the checkpoint" for n in ours if n not in theirs]
    told += [f"{n} is not in the model" for n in theirs if n not in ours]
    told += [
        f"{n} is {list(s)} in the model, {theirs[n]} saved" for n, s in ours.items() if theirs.get(n, s) != list(s)
    ]
    listed = "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "")
    return f"the model differs from the one that was saved: {listed}. Resume with the run's own config"
