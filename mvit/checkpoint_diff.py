"""What differs between two checkpoints: tensors element by element, groups, counters, data cursor, recipe."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mvit.checkpoint import Manifest
from mvit.checkpoint_load import read_buffers, whole_states
from mvit.fragments import ALL_MOMENTS, EMA, MASTER
from mvit.run_identity import flatten


@dataclass(frozen=True)
class TensorDifference:
    """How one state of one parameter differs."""

    state: str
    name: str
    differing: int
    """Elements that are not equal bit for bit."""
    numel: int
    largest: float
    """Largest absolute difference."""
    relative: float
    """L2 norm of the difference over that of the first checkpoint's values."""


@dataclass(frozen=True)
class CheckpointDifference:
    """Everything that differs; false if nothing does."""

    compared: int
    """Tensors compared."""
    tensors: tuple[TensorDifference, ...]
    facts: tuple[str, ...]
    """Steps, counters, groups, cursor and recipe: `key: first -> second`; tensors that only one of them has."""

    def __bool__(self) -> bool:
        return bool(self.tensors or self.facts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_checkpoints(
    first: Manifest, second: Manifest, *, progress: Callable[[int, int], None] | None = None
) -> CheckpointDifference:
    """Compare two checkpoints, saved at whatever world sizes and ZeRO stages.

    Tensors with equal 64-bit fingerprints count as equal and are not read; of the others one at a time is in memory.
    `progress` is called with the tensors done and their number.
    """
    held = [{state for file in one.files for state in file["states"]} for one in (first, second)]
    states = [state for state in (MASTER, *ALL_MOMENTS, EMA) if state in held[0] & held[1]]
    trained = first.trained & second.trained
    shared = [name for name, shape in first.shapes.items() if second.shapes.get(name) == shape]
    pairs = [(state, name) for state in states for name in shared if name in trained or state == MASTER]
    found: list[TensorDifference] = []
    for done, (state, name) in enumerate(pairs, start=1):
        prints = [manifest.fingerprints.get(state, {}).get(name) for manifest in (first, second)]
        if prints[0] is None or prints[0] != prints[1]:
            (_, ours), (_, other) = (next(whole_states(one, state, {name})) for one in (first, second))
            if not torch.equal(ours.view(torch.int32), other.view(torch.int32)):
                found.append(_difference(state, name, ours, other))
        if progress is not None:
            progress(done, len(pairs))
    facts = [
        f"{name}: {first.shapes.get(name, 'absent')} -> {second.shapes.get(name, 'absent')}"
        for name in dict.fromkeys((*first.shapes, *second.shapes))
        if first.shapes.get(name) != second.shapes.get(name)
    ]
    facts += [
        f"{name}: trained in one, frozen in the other" for name in shared if name in first.trained ^ second.trained
    ]
    facts += _different_buffers(first, second)
    before, after = flatten(_facts(first)), flatten(_facts(second))
    facts += [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    return CheckpointDifference(len(pairs), tuple(found), tuple(facts))


def _different_buffers(first: Manifest, second: Manifest) -> list[str]:
    ours, other = (read_buffers(manifest) for manifest in (first, second))
    return [
        f"buffer {name}: " + ("differs" if name in ours and name in other else "only in one")
        for name in dict.fromkeys((*ours, *other))
        if name not in ours or name not in other or not torch.equal(ours[name], other[name])
    ]


def _difference(state: str, name: str, ours: torch.Tensor, other: torch.Tensor) -> TensorDifference:
    gap = (ours.double() - other.double()).abs()
    norm = float(ours.double().norm())
    return TensorDifference(
        state,
        name,
        int((ours.view(torch.int32) != other.view(torch.int32)).sum()),
        ours.numel(),
        float(gap.max()),
        float(gap.norm()) / norm if norm else float("inf"),
    )


def _facts(manifest: Manifest) -> dict[str, Any]:
    groups = {group["name"]: {k: v for k, v in group.items() if k != "name"} for group in manifest.groups}
    state = {key: value for key, value in manifest.state.items() if key != "log_window"}
    return {
        "step": manifest.step,
        "world_size": manifest.world_size,
        "ema": manifest.has_ema,
        "groups": groups,
        **state,
    }
