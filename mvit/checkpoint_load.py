"""Reading a checkpoint: into the live fragments of any world size and stage, or as whole weights.

What was loaded is then read out of the engine again and compared with the fingerprints of the manifest.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from mvit.checkpoint import CheckpointError, Manifest, read_manifest
from mvit.distributed import RankInfo, gather_objects
from mvit.fingerprint import differing, fingerprint, state_fingerprints
from mvit.fragments import EMA, FROZEN, MASTER, Fragment

_MAX_LISTED = 5


class _Reader:
    """Reads ranges of parameters out of a checkpoint's files, into memory that is there already."""

    def __init__(self, manifest: Manifest) -> None:
        self._path, self._held = manifest.path, manifest.held
        self._open: tuple[str, IO[bytes]] | None = None  # one at a time: a thousand ranks' files are too many
        self._flats: dict[tuple[str, str], int] = {}  # (file, key) → where its first element lies
        self._index: dict[str, list[tuple[int, int, int, str]]] = {}
        self.frozen: set[str] = set()
        for file in manifest.files:
            for name, _, start, count, offset in (*file["table"], *file.get("frozen", ())):
                self._index.setdefault(name, []).append((start, count, offset, file["file"]))
            self.frozen |= {name for name, *_ in file.get("frozen", ())}

    def read_into(self, target: Tensor, name: str, start: int, key: str) -> None:
        """Fill the 1-D `target` with elements [start, start + len) of state `key` of parameter `name`."""
        held = self._held.get((name, MASTER if name in self.frozen else key))
        if held is not None:
            target.copy_(held[start : start + target.numel()])
            return
        key = FROZEN if name in self.frozen else key
        got, stop = 0, start + target.numel()
        for at, count, offset, file in self._index[name]:
            low, high = max(start, at), min(stop, at + count)
            if low < high:
                self._read(target[low - start : high - start], file, key, offset + low - at)
                got += high - low
        assert got == target.numel(), name

    def _read(self, target: Tensor, file: str, key: str, element: int) -> None:
        """Read plainly instead of mapping the file: what was read does not stay in this process's memory."""
        direct = target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous()
        into = target if direct else torch.empty(target.numel())
        handle = self._handle(file)
        if (file, key) not in self._flats:
            handle.seek(0)
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
            self._flats[file, key] = 8 + length + header[key]["data_offsets"][0]
        handle.seek(self._flats[file, key] + 4 * element)
        view, done = into.detach().numpy().view("uint8").data, 0
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{handle.name}: ends within {key!r}; see `mvit checkpoint verify`")
            done += count
        if not direct:
            target.copy_(into)

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, open(self._path / file, "rb", buffering=0))  # noqa: SIM115
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def load_into(manifest: Manifest, fragments: Sequence[Fragment], shapes: Mapping[str, Sequence[int]]) -> None:
    """Fill the fragments' views from a checkpoint saved at any world size and stage.

    Raises CheckpointError if the model's parameters are not those of the checkpoint, or if others are frozen.
    """
    if {name: list(shape) for name, shape in shapes.items()} != manifest.shapes:
        raise CheckpointError(f"{manifest.path}: {_shape_difference(shapes, manifest.shapes)}")
    if manifest.has_ema != any(EMA in f.states for f in fragments) and any(not f.frozen for f in fragments):
        raise CheckpointError(
            f"{manifest.path}: the moving average is in the checkpoint or in the run, but not in both"
        )
    reader = _Reader(manifest)
    changed = [f.name for f in fragments if f.frozen != (f.name in reader.frozen)]
    if changed:
        raise CheckpointError(
            f"{manifest.path}: {_listed(changed)} is frozen in the checkpoint or in the run, but not in both; resume "
            "with the run's own config"
        )
    with closing(reader):
        for fragment in fragments:
            for key, view in fragment.states.items():
                reader.read_into(view, fragment.name, fragment.start, key)


def load_buffers(manifest: Manifest, buffers: Mapping[str, Tensor]) -> None:
    """Fill a model's persistent buffers; raises CheckpointError if the checkpoint has others."""
    if set(buffers) != set(manifest.buffers):
        other = sorted(set(buffers) ^ set(manifest.buffers))
        raise CheckpointError(f"{manifest.path}: the buffers of model and checkpoint differ in {_listed(other)}")
    for name, saved in read_buffers(manifest).items():
        if saved.shape != buffers[name].shape:
            shapes = f"{list(saved.shape)} saved, {list(buffers[name].shape)} in the model"
            raise CheckpointError(f"{manifest.path}: buffer {name} is {shapes}")
        buffers[name].copy_(saved)


def read_buffers(manifest: Manifest) -> dict[str, Tensor]:
    """Return a checkpoint's buffers by name."""
    if not manifest.buffers:
        return {}
    with safe_open(manifest.path / manifest.files[0]["file"], "pt") as file:
        return {name: file.get_tensor(f"buffer.{name}") for name in manifest.buffers}


def check_loaded(
    manifest: Manifest,
    fragments: Sequence[Fragment],
    groups: Sequence[Mapping[str, Any]],
    ranks: RankInfo,
    replicas: Mapping[str, int] | None = None,
) -> None:
    """Compare the live training state with what the manifest says was saved (collective).

    Compared are fp32 masters, both moments and the average by fingerprint, each group's hyperparameters and members,
    frozen weights, and that the forward pass uses the masters' weights: on each rank those of its own masters, and by
    `replicas`, {parameter: fingerprint of the whole weights} where every rank has them, all others. Raises
    CheckpointError on every rank.
    """
    found = state_fingerprints(
        [f for f in fragments if not f.frozen], list(manifest.shapes), list(manifest.fingerprints), ranks
    )
    wrong = [f"{state} of {name}" for state, name in differing(manifest.fingerprints, found)]
    wrong += _different_groups(manifest.groups, groups)
    try:
        local = _different_here(manifest, fragments)
    except Exception as error:  # a file that cannot be read here: the other ranks wait for this one
        local = [f"{type(error).__name__}: {error}"]
    everywhere = gather_objects((local, dict(replicas or {})))
    wrong += [f"rank {rank}: {text}" for rank, (texts, _) in enumerate(everywhere) for text in texts]
    first = everywhere[0][1]
    wrong += [
        f"rank {rank}: the weights that the forward pass uses of {name}"
        for rank, (_, prints) in enumerate(everywhere)
        for name in first
        if prints.get(name) != first[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{manifest.path}: after loading, {len(wrong)} part(s) of the training state differ from what was saved: "
            f"{_listed(wrong)}. The run does not train on from a state it never had. This is a defect of mvit or of "
            "this machine: try again elsewhere, and report it with this message"
        )


def _different_here(manifest: Manifest, fragments: Sequence[Fragment]) -> list[str]:
    """Compare what no sum over ranks can: frozen weights, this rank's weights and its own copy of a replica."""
    wrong = _different_frozen(manifest, [f for f in fragments if f.frozen])
    for f in fragments:
        if f.frozen:
            continue
        if not torch.equal(f.states[MASTER].to(f.weights.device, f.weights.dtype), f.weights):
            wrong.append(f"the weights that the forward pass uses of {f.name}")
        elif f.replicated:  # every rank holds a copy of its own, and the sums above saw a share of each
            wrong += _different_replica(manifest, f)
    return wrong


def _different_frozen(manifest: Manifest, fragments: Sequence[Fragment]) -> list[str]:
    wrong = []
    with closing(_Reader(manifest)) as reader:
        for f in fragments:
            saved = torch.empty(f.count)
            reader.read_into(saved, f.name, f.start, MASTER)
            if not torch.equal(saved.to(f.weights.dtype), f.weights.cpu()):
                wrong.append(f"the frozen weights of {f.name}")
    return wrong


def _different_replica(manifest: Manifest, fragment: Fragment) -> list[str]:
    return [
        f"{state} of {fragment.name}"
        for state, prints in manifest.fingerprints.items()
        if state in fragment.states
        and f"{int(fingerprint(fragment.states[state])) % 2**64:016x}" != prints[fragment.name]
    ]


def _different_groups(saved: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = {group["name"]: group for group in found}
    wrong = [f"parameter group {name}" for name in ours.keys() ^ {group["name"] for group in saved}]
    for group in saved:
        now = ours.get(group["name"], {})
        for key in group.keys() & now.keys():
            same = sorted(group[key]) == sorted(now[key]) if key == "parameters" else group[key] == now[key]
            if not same:
                wrong.append(f"{key} of parameter group {group['name']}")
    return wrong


def load_rng(manifest: Manifest, rank: int) -> dict[str, Tensor]:
    """Return the random states `rank` saved; empty if the checkpoint had fewer ranks."""
    if rank >= len(manifest.files):
        return {}
    with safe_open(manifest.path / manifest.files[rank]["file"], "pt") as file:
        return {key.removeprefix("rng."): file.get_tensor(key) for key in file.keys() if key.startswith("rng.")}  # noqa: SIM118


def whole_weights(path: Path, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter as a whole fp32 tensor, one at a time; `ema` takes the moving average."""
    manifest = read_manifest(path)
    if ema and not manifest.has_ema:
        raise CheckpointError(f"{path}: holds no moving average; train with optim.ema_decay, or leave the option out")
    yield from whole_states(manifest, EMA if ema else MASTER)


def state_layout(manifest: Manifest) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return type and shape of all that the model's state dict holds, parameters and buffers, wide numbers first.

    In a file of that order every number is aligned.
    """
    layout = {name: (torch.float32, list(shape)) for name, shape in manifest.shapes.items()}
    layout |= {name: (buffer.dtype, list(buffer.shape)) for name, buffer in read_buffers(manifest).items()}
    return dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))


def whole_state(path: Path, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield all that the model's state dict holds, one tensor at a time, in the order of `state_layout`.

    Only weights are averaged: `ema` has the run's own buffers beside them, as its evaluations of the average do.
    """
    manifest = read_manifest(path)
    weights, buffers = whole_weights(path, ema=ema), read_buffers(manifest)
    for name in state_layout(manifest):
        yield (name, buffers[name]) if name in buffers else next(weights)


def whole_states(manifest: Manifest, state: str, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield one state of every parameter that has it, or of `names`, whole and in fp32, one at a time.

    A frozen parameter is its own average and has no moments.
    """
    with closing(_Reader(manifest)) as reader:
        for name, shape in manifest.shapes.items():
            if (names is not None and name not in names) or (name in reader.frozen and state not in (MASTER, EMA)):
                continue
            flat = torch.empty(torch.Size(shape).numel())
            reader.read_into(flat, name, 0, state)
            yield name, flat.view(shape)
            del flat  # not two at a time


def _shape_difference(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> str:
    told = [f"{n} is not in the checkpoint" for n in ours if n not in theirs]
    told += [f"{n} is not in the model" for n in theirs if n not in ours]
    told += [
        f"{n} is {list(s)} in the model, {theirs[n]} saved" for n, s in ours.items() if theirs.get(n, s) != list(s)
    ]
    return f"the model differs from the one that was saved: {_listed(told)}. Resume with the run's own config"


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return "; ".join(texts[:_MAX_LISTED]) + more
