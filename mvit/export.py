"""Plain weights out of a run's checkpoint: one file that needs neither DeepSpeed nor this project."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvit.checkpoint import CheckpointError, newest_valid, read_manifest
from mvit.checkpoint_load import whole_weights
from mvit.config import parse_config
from mvit.model.convert import export_names
from mvit.tasks import create_task

Naming = Literal["mvit", "timm", "official"]


def export_weights(source: Path, out: Path, *, naming: Naming = "mvit", ema: bool = False) -> Path:
    """Write the fp32 weights of a run's newest valid checkpoint, or of one checkpoint folder, to `out`.

    `.safetensors` holds the tensors, with the resolved config as metadata; `.pth` and `.pyth` hold
    {"model_state": tensors}, as the published checkpoints do. The file is read back and compared before it gets its
    name. Raises CheckpointError or ValueError if there is nothing to export or the suffix is unknown.
    """
    if out.suffix not in (".safetensors", ".pth", ".pyth"):
        raise ValueError(f"{out}: unknown suffix {out.suffix!r}; use .safetensors, .pth or .pyth")
    path = source if (source / "manifest.json").is_file() else newest_valid(source)
    if path is None:
        raise CheckpointError(f"{source}: holds no checkpoint; name a run folder or a checkpoint")
    manifest = read_manifest(path)
    ours = dict(whole_weights(path, ema=ema))
    tensors = ours if naming == "mvit" else export_names(ours, naming)
    part = out.with_name(f".{out.stem}.tmp{out.suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(part, tensors, manifest.step, manifest.state["config"])
        _compare(part, ours, manifest.state["config"])
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


def load_model(path: str | Path) -> nn.Module:
    """Build the model that an exported .safetensors file belongs to and load its weights, in evaluation mode.

    The file carries the recipe it was trained with. Raises ValueError for a file that `mvit export` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: not a .safetensors file that `mvit export` wrote ({error!r}); build the model with "
            "mvit.create_model and fill it with mvit.load_weights"
        ) from error
    task = create_task(parse_config(config, source=str(path)))
    model = task.build_model()
    task.load_weights(model, path)
    return model.eval()


def _write(path: Path, tensors: dict[str, Tensor], step: int, config: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt", "step": str(step), "config": json.dumps(config)})
    else:
        torch.save({"model_state": tensors, "epoch": 0, "step": step}, path)


def _compare(path: Path, wanted: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Load the file as a user would and raise CheckpointError unless every weight is what the run has."""
    task = create_task(parse_config(config, source="the run's config"))
    model = task.build_model()
    task.load_weights(model, path)
    differing = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, wanted[name])]
    if differing:
        raise CheckpointError(f"{path}: {len(differing)} tensors differ after reading back, {differing[0]} first")
