"""A run's weights as a Hugging Face-style folder: model.safetensors, config.json, preprocessor_config.json.

Where timm has the model, the names are timm's, and `timm.create_model("local-dir:FOLDER", pretrained=True)` builds it
without our code; else the names are ours, and `mvit.load_model(FOLDER)` does.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mvit.checkpoint import read_manifest
from mvit.class_names import class_names
from mvit.config import RunConfig, parse_config
from mvit.export import WEIGHTS_NAME, export_weights, find_checkpoint
from mvit.export_timm import check_timm_has, timm_architecture

_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers


@dataclass(frozen=True)
class ExportedFolder:
    """An exported folder."""

    path: Path
    timm: str | None
    """timm's name of the model, None if it has none."""
    reason: str
    """Why it has none, "" if it has."""


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    ema: bool = False,
    step: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportedFolder:
    """Write the image classifier of a run, or of a checkpoint, into the folder `out`; options as in `export_weights`.

    Raises ValueError for detectors and clips, and for a folder that holds something without `overwrite`, which replaces
    the three files and leaves others; else as `export_weights`.
    """
    source, out = Path(source), Path(out)
    _refuse(out, overwrite)
    manifest = read_manifest(find_checkpoint(source, step))
    config = parse_config(manifest.state["config"], source=str(manifest.path))
    if config.task != "image_classification":
        raise ValueError(
            f"{config.name}: format 'huggingface' is for image classifiers, whose preprocessing it describes, task is "
            f"{config.task}; export as safetensors, which carries the recipe"
        )
    reason = ""
    try:
        check_timm_has(manifest.shapes, config)
    except ValueError as error:
        reason = str(error).split(";")[0].removeprefix("format 'timm': ")
    name = None if reason else timm_architecture(config)
    if name is None and not reason:
        reason = "timm builds the paper's sizes by name, not a model of other sizes"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        weights = Path(scratch) / WEIGHTS_NAME
        form = "safetensors" if name is None else "timm"
        export_weights(manifest.path, weights, format=form, ema=ema, verify=verify)
        described = _own_config(config) if name is None else _timm_config(config, name)
        for file, content in (("config.json", described), ("preprocessor_config.json", _preprocessing(config))):
            (Path(scratch) / file).write_text(json.dumps(content, indent=2) + "\n")
        _refuse(out, overwrite)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json"):  # read first: last
            os.replace(file, out / file.name)
    return ExportedFolder(out, name, reason)


def _refuse(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ValueError(f"{out}: is a file; format 'huggingface' writes a folder, name another")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"{out}: holds something already; name another folder, or replace with overwrite (--overwrite)"
        )


def _labels(config: RunConfig) -> list[str]:
    return list(class_names(config).names)


def _timm_config(config: RunConfig, name: str) -> dict[str, Any]:
    """Return what timm's `local-dir:` and `hf-hub:` sources read, and transformers' wrapper of timm."""
    image = config.image
    return {
        "architecture": name,
        "num_classes": config.model.num_classes,
        "num_features": 8 * config.model.resolved_variant().embed_dim,
        "label_names": _labels(config),
        "model_args": {"img_size": list(image.image_size)},
        "pretrained_cfg": {
            "input_size": [3, *image.image_size],
            "fixed_input_size": True,
            "interpolation": image.interpolation,
            "crop_pct": 1.0 if image.full_resize else image.crop_pct,
            "crop_mode": "squash" if image.full_resize else "center",
            "mean": list(image.mean),
            "std": list(image.std),
            "num_classes": config.model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }


def _own_config(config: RunConfig) -> dict[str, Any]:
    labels = _labels(config)
    return {
        "library_name": "mvit",
        "architectures": ["MViT"],
        "image_size": list(config.image.image_size),
        "num_labels": len(labels),
        "id2label": {str(label): name for label, name in enumerate(labels)},
        "recipe": config.model_dump(mode="json"),
    }


def _preprocessing(config: RunConfig) -> dict[str, Any]:
    """Return the evaluation's treatment of pictures in the words of Hugging Face's image processors."""
    image = config.image
    height, width = image.image_size
    if image.full_resize:
        size = {"height": height, "width": width}
    elif height == width:
        size = {"shortest_edge": math.floor(height / image.crop_pct)}
    else:  # covers what is cut out, with one factor for both sides
        size = {"shortest_edge": math.floor(max(height, width) / image.crop_pct)}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLE[image.interpolation],
        "do_center_crop": not image.full_resize,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
