"""Plain weights out of a run's checkpoint: one file that needs neither DeepSpeed nor this project."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, cast

from safetensors import SafetensorError, safe_open
from torch import nn

from mvit.checkpoint import CheckpointError, Manifest, checkpoint_path, list_steps, newest_valid, read_manifest
from mvit.checkpoint import verify as verify_checkpoint
from mvit.checkpoint_load import state_layout, whole_state
from mvit.config import RunConfig, parse_config
from mvit.export_check import build_to_fill, check_logits, check_tensors
from mvit.export_formats import free_each, write_safetensors, write_torch
from mvit.export_timm import check_timm_has, timm_names
from mvit.tasks import create_task

Format = Literal["safetensors", "timm", "facebook", "torch"]
Progress = Callable[[int, int], None]
WEIGHTS_NAME = "model.safetensors"  # in a folder, as Hugging Face calls it
# format → the suffixes it may have; a suffix alone stands for the first format here that has it
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "torch": (".pth", ".pt"),
    "facebook": (".pyth",),
    "timm": (".safetensors", ".pth", ".pt"),
}


def export_weights(
    source: str | Path,
    out: str | Path,
    *,
    format: Format | None = None,
    ema: bool = False,
    step: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write the weights of a run's newest valid checkpoint, of another step, or of a checkpoint folder to `out`.

    "safetensors" is our file, which `load_model` rebuilds its model from; "timm" has timm's names and loads strictly
    into its MultiScaleVit; "facebook" is {"model_state": …} in the official naming; "torch" a plain state dict in our
    names. None decides by the suffix. Weights are fp32. Running statistics (buffers) stand beside them as they are;
    beside an average, too: only weights are averaged, and the run's evaluations of the average used them so.

    Memory for one tensor is enough, and with `verify` for one model: then every tensor is compared with the
    checkpoint's bit for bit, and the logits of the model that a user builds from the file with those of the run's own,
    before the file gets its name. `progress` is called with (done, total) tensors.

    Raises ValueError for what a format cannot hold and for an existing file without `overwrite`, CheckpointError if
    there is nothing to export or the file differs, OSError if it cannot be written; `out` is then left as it was.
    """
    source, out = Path(source), Path(out)
    format = _checked_format(format, out)
    refuse_existing(out, overwrite)
    manifest = read_manifest(find_checkpoint(source, step))
    if ema and not manifest.has_ema:
        raise CheckpointError(
            f"{manifest.path}: holds no moving average; train with optim.ema_decay, or leave the option out"
        )
    names = _names(manifest, format)
    count = _counter(progress, len(names) * (1 + verify))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        part = Path(scratch) / out.name
        try:
            _write(part, manifest, names, format, ema, count)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{out} cannot be written: {reason}; nothing was exported") from error
        if verify:
            check_tensors(part, free_each(whole_state(manifest.path, ema=ema)), names, count)
            check_logits(part, manifest, ema=ema, timm=format == "timm", load=load_model)
        refuse_existing(out, overwrite)
        os.replace(part, out)
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the name, too, is on disk
    finally:
        os.close(handle)
    return out


def load_model(path: str | Path) -> nn.Module:
    """Build the model that an exported .safetensors file belongs to and load its weights, in evaluation mode.

    The file, or the folder that holds it, carries the recipe it was trained with. Raises ValueError for one that
    `mvit export` did not write.
    """
    path = _weights_file(path)
    task = create_task(exported_config(path))
    model = build_to_fill(task)
    task.load_weights(model, path)
    return model.eval()


def _weights_file(path: str | Path) -> Path:
    return Path(path) / WEIGHTS_NAME if Path(path).is_dir() else Path(path)


def exported_config(path: str | Path) -> RunConfig:
    """Read the recipe that an exported .safetensors file, or the folder that holds it, carries.

    Raises ValueError for a file that `mvit export` did not write.
    """
    try:
        with safe_open(_weights_file(path), "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: not a .safetensors file that `mvit export` wrote ({error!r}), so it does not say what model it "
            "is of; build that with mvit.create_model and fill it with mvit.load_weights, or give `mvit predict` its "
            "--recipe"
        ) from error
    return parse_config(config, source=str(path))


def _checked_format(format: str | None, out: Path) -> Format:
    """Return the format, by the suffix if none is given; raise ValueError if the two do not go together."""
    known = [name for name, suffixes in _SUFFIXES.items() if out.suffix in suffixes]
    if format is None:
        if not known:
            every = ", ".join(sorted({suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}))
            raise ValueError(f"{out}: the suffix {out.suffix!r} stands for no format; use one of {every}")
        format = known[0]
    if format not in _SUFFIXES:
        raise ValueError(f"format {format!r} is not known; choose from {', '.join(_SUFFIXES)}")
    if format not in known:
        raise ValueError(
            f"{out}: format {format!r} goes with {' or '.join(_SUFFIXES[format])}, not with {out.suffix!r}; "
            "change the one or the other"
        )
    return cast(Format, format)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise ValueError for a folder, and for a file that is there without `overwrite`."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name the file to write")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists already; name another file, or replace it with overwrite (--overwrite)")


def find_checkpoint(source: Path, step: int | None) -> Path:
    """Return the checkpoint folder to export, every byte verified."""
    if (source / "manifest.json").is_file():
        path, found = source, read_manifest(source).step
        if step not in (None, found):
            raise CheckpointError(f"{source}: is the checkpoint of step {found}, not of step {step}; name the run")
    elif step is not None:
        path, steps = checkpoint_path(source, step), list_steps(source)
        if step not in steps:
            held = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
            raise CheckpointError(f"{source}: holds no checkpoint of step {step}; it has {held}")
    else:
        newest = newest_valid(source)
        if newest is None:
            raise CheckpointError(f"{source}: holds no checkpoint; name a run folder or a checkpoint")
        return newest
    problems = verify_checkpoint(path)
    if problems:
        raise CheckpointError(f"{path}: is damaged: {'; '.join(problems)}")
    return path


def _names(manifest: Manifest, format: Format) -> dict[str, str]:
    """Return {our name: name in the file}; raise ValueError for a model that the format's code does not have."""
    own = {name: name for name in (*manifest.shapes, *manifest.buffers)}
    if format != "timm":
        return own
    check_timm_has(manifest.shapes, parse_config(manifest.state["config"], source=str(manifest.path)))
    return own | timm_names(manifest.shapes)


def _write(
    part: Path, manifest: Manifest, names: Mapping[str, str], format: Format, ema: bool, count: Callable[[], None]
) -> None:
    config = json.dumps(manifest.state["config"])
    metadata = {"format": "pt", "step": str(manifest.step), "ema": json.dumps(ema), "config": config}
    flat = part.with_name(f"{part.stem}.safetensors")  # what the file is, or what it is made of
    tensors, layout = free_each(whole_state(manifest.path, ema=ema)), state_layout(manifest)
    write_safetensors(flat, tensors, layout, names, metadata, count)
    if flat != part:
        beside = {"epoch": 0, "step": manifest.step, "config": config}
        write_torch(part, flat, beside if format == "facebook" else None)
        flat.unlink()


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count
