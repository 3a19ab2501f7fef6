"""Is an exported file what the run has? Every tensor bit for bit, and the logits of the model a user builds from it."""

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvit.checkpoint import CheckpointError, Manifest
from mvit.checkpoint_load import whole_state
from mvit.config import RunConfig, parse_config
from mvit.export_formats import free_each, return_freed_memory
from mvit.export_timm import build_timm
from mvit.tasks import create_task
from mvit.tasks.base import Task
from mvit.weight_files import read_checkpoint

TIMM_TOLERANCE = 2e-5
"""Largest difference from timm's logits, relative to the largest logit: it sums in another order."""


def check_tensors(
    path: Path, tensors: Iterator[tuple[str, Tensor]], names: Mapping[str, str], count: Callable[[], None]
) -> None:
    """Raise CheckpointError unless the file holds exactly these tensors, bit for bit, under their new names."""
    state = _state(path)
    if state.keys() != set(names.values()):
        raise CheckpointError(f"{path.name}: reading it back gives other names than were written")
    for name, tensor in tensors:
        found = state[names[name]]
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        if not (same and torch.equal(*(both.reshape(-1).view(torch.uint8) for both in (found, tensor)))):
            raise CheckpointError(f"{path.name}: {names[name]} differs after reading back; nothing was exported")
        count()


@torch.no_grad()
def check_logits(path: Path, manifest: Manifest, *, ema: bool, timm: bool, load: Callable[[Path], nn.Module]) -> None:
    """Raise CheckpointError unless the model built from the file gives the logits of the run's own model.

    The same bits from our models, within TIMM_TOLERANCE from timm's. The two are never in memory together. `load`
    builds the model that belongs to a .safetensors file.
    """
    config = parse_config(manifest.state["config"], source=str(manifest.path))
    task = create_task(config)
    with torch.random.fork_rng(devices=[]):
        expected = task.answer(build_own(task, manifest, ema).eval())
        gc.collect()
        return_freed_memory()
        found = task.answer(_consumers(path, task, config, timm, load).eval())
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{path.name}: the model built from it answers otherwise than the run's; nothing was exported"
        )
    if not expected.isfinite().all():
        raise CheckpointError(
            f"{manifest.path}: its model's logits are not finite; to export such weights all the same, leave out "
            "the verification (verify=False, --no-verify)"
        )
    largest, difference = float(expected.abs().max()), float((found - expected).abs().max())
    if not difference <= (TIMM_TOLERANCE if timm else 0.0) * largest:
        raise CheckpointError(
            f"{path.name}: the model built from it gives other logits than the run's, by {difference:.1e} where the "
            f"largest is {largest:.1e}; nothing was exported"
        )


def build_to_fill(task: Task) -> nn.Module:
    """Build a task's model for weights that are at hand: without the time and memory that random ones take.

    The caller must set every parameter and every buffer of the state dict.
    """
    with torch.device("meta"):
        model = task.build_model()
    if {name for name, _ in model.named_buffers()} - model.state_dict().keys():  # these hold what no file does
        return task.build_model()
    return model.to_empty(device="cpu")


def build_own(task: Task, manifest: Manifest, ema: bool) -> nn.Module:
    """Build the model of a checkpoint; raise CheckpointError if its config describes another."""
    model = build_to_fill(task)
    state = model.state_dict()
    if state.keys() != {*manifest.shapes, *manifest.buffers}:
        raise CheckpointError(f"{manifest.path}: its weights are not those of the model that its config describes")
    for name, tensor in free_each(whole_state(manifest.path, ema=ema)):
        state[name].copy_(tensor)
    return model


def _consumers(path: Path, task: Task, config: RunConfig, timm: bool, load: Callable[[Path], nn.Module]) -> nn.Module:
    """Build the model from the file as its users do."""
    if timm:
        model = build_timm(config)
        try:
            model.load_state_dict(_state(path), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path.name}: does not load into timm's model: {error}") from error
        return model
    if path.suffix == ".safetensors":
        return load(path)
    model = build_to_fill(task)
    task.load_weights(model, path)
    return model


def _state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped."""
    content: Any = read_checkpoint(path)
    return content.get("model_state", content)
