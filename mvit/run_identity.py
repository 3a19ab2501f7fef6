"""The run folder: whose it is, its resolved config, and what may change when a run continues."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mvit.checkpoint import list_steps
from mvit.config import ConfigError, RunConfig, parse_config

# Where and how fast a run goes may change between attempts; what it computes may not.
_MAY_CHANGE = (
    "output_dir",
    "data.train",  # the same samples in another place: the data cursor's fingerprint decides
    "data.validation",
    "data.cache_dir",
    "data.cache_gib",
    "data.num_workers",
    "data.prefetch",
    "data.pin_memory",
    "data.max_bad_samples",
    "model.weights",  # read before the first step only
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluation_batch_size",
    "train.save_every",
    "train.node_mttf_h",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.async_save",
    "train.log_images",
    "train.peak_tflops",
    "zero",
    "watch",
    "profile",
)


def config_path(run_dir: Path) -> Path:
    """Return where a run keeps its resolved config."""
    return run_dir / "config.yaml"


def read_config(run_dir: Path) -> RunConfig:
    """Read the resolved config of a run; raises ConfigError if the folder holds no run."""
    file = config_path(run_dir)
    if not run_dir.exists():
        raise ConfigError(f"{run_dir} does not exist; name the folder of a run: output_dir/name of its recipe")
    if not file.is_file():
        raise ConfigError(f"{run_dir}: holds no config.yaml, so it is not a run folder; name the folder of a run")
    return parse_config(yaml.safe_load(file.read_text()), source=str(file))


def claim(run_dir: Path, config: RunConfig) -> None:
    """Create the run folder for `config`, or accept it if it holds the same run or one that never saved anything.

    Raises ConfigError if the folder belongs to another run: the keys that differ are named.
    """
    file = config_path(run_dir)
    if file.is_file() and list_steps(run_dir):
        differing = differences(read_config(run_dir), config)
        if differing:
            raise ConfigError(
                f"{run_dir} belongs to another run; it differs in {'; '.join(differing)}. Choose another `name` or "
                f"`output_dir`, or continue that run with `mvit resume {run_dir}`"
            )
    elif not file.is_file() and run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} exists, is not empty and holds no run; choose another `name` or `output_dir`")
    run_dir.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".config.{os.getpid()}.tmp")
    part.write_text(config.to_yaml())
    part.replace(file)


def differences(saved: RunConfig, new: RunConfig) -> list[str]:
    """List what `new` would compute differently from `saved`, as `key: saved value -> new value`."""
    before, after = flatten(saved.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == k or key.startswith(k + ".") for k in _MAY_CHANGE)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of mappings as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
