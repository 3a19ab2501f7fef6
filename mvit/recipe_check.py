"""Recipes beside what is published of them, key by key: the same, different for a reason, or unexplained."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvit.config import RunConfig, load_config
from mvit.published import PublishedRecipe, PublishedValue
from mvit.run_identity import flatten

Status = Literal["same", "explained", "chosen", "ours", "UNEXPLAINED"]

# What a recipe's key is compared as, where the published value is stated in other terms.
_SAID_BY = {
    "optim.lr": "peak_lr",
    "optim.lr_batch_size": "peak_lr",
    "schedule.warmup_lr": "start_lr",
    "schedule.end_lr": "final_lr",
    "video.num_clips": "views",
    "video.num_crops": "views",
}
_SAID_BY_STEPS = {"schedule.epochs": "steps", "schedule.milestones": "falls"}
_DERIVED: dict[str, Callable[[RunConfig, int], Any]] = {
    "peak_lr": lambda config, samples: config.scaled_lr(config.optim.lr),
    "start_lr": lambda config, samples: config.scaled_lr(config.schedule.warmup_lr),
    "final_lr": lambda config, samples: config.scaled_lr(config.schedule.end_lr),
    "bias_decay": lambda config, samples: 0.0,  # parameter_groups never decays them
    "views": lambda config, samples: f"{config.video.num_clips} x {config.video.num_crops}",
    "steps": lambda config, samples: config.total_steps(samples),
    "falls": lambda config, samples: [int(p * config.total_steps(samples)) for p in config.schedule.milestones],
    "model.class_token": lambda config, samples: _as_published(config.model.class_token, config.task.startswith("vid")),
    "model.expand": lambda config, samples: config.model.expand or _default_expand(config),
}


@dataclass(frozen=True)
class Comparison:
    """One key of one recipe."""

    key: str
    published: Any
    ours: Any
    source: str
    status: Status
    """"chosen": the sources are silent; "ours": changes no result, or is each user's."""
    reason: str = ""


def check_recipe(path: Path, published: PublishedRecipe | None, *, count: bool = True) -> list[Comparison]:
    """Compare a recipe with what is published, every key that it sets included; `count` builds the model, too.

    What has no reason is UNEXPLAINED: a difference, a choice where the sources are silent, a key that the file of
    published values does not have, and a reason that nothing needs.
    """
    if published is None:
        return [Comparison("(recipe)", None, str(path), "", "UNEXPLAINED", "configs/published has no entry of it")]
    config = load_config(path)
    resolved = flatten(config.model_dump(mode="json"))
    rows, used = [], set()

    def add(key: str, value: PublishedValue, ours: Any) -> None:
        status = _status(value, ours, key in published.reasons)
        if status in ("explained", "chosen"):
            used.add(key)
        rows.append(Comparison(key, value.value, ours, value.source, status, published.reasons.get(key, "")))

    for key, value in published.values.items():
        ours = _DERIVED[key](config, published.samples or 0) if key in _DERIVED else resolved.get(key, "no such key")
        add(key, value, ours)
    if published.parameters_m is not None and count:
        value, digits = published.parameters_m, len(str(published.parameters_m).partition(".")[2])
        add("parameters", PublishedValue(value, "in millions, as printed"), round(parameters(config) / 1e6, digits))
    for key in _set_keys(path):
        said_by = _SAID_BY_STEPS.get(key) if "steps" in published.values else None
        said_by = said_by or _SAID_BY.get(key, key)
        if said_by not in published.values:
            reason = published.ours.get(key, "")
            status: Status = "ours" if reason else "UNEXPLAINED"
            rows.append(Comparison(key, None, resolved.get(key), "", status, reason or "no published value, no reason"))
    needless = [key for key in published.reasons if key not in used and (count or key != "parameters")]
    rows += [Comparison(key, None, None, "", "UNEXPLAINED", "a reason that nothing needs") for key in needless]
    return rows


def parameters(config: RunConfig) -> int:
    """Return the number of parameters, without giving them memory."""
    import torch

    from mvit.tasks import create_task

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_task(config).build_model().parameters())


def _status(published: PublishedValue, ours: Any, has_reason: bool) -> Status:
    silent = published.value is None
    if _same(published.value, ours):
        return "same"
    if not has_reason:
        return "UNEXPLAINED"
    return "chosen" if silent else "explained"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float | int) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=1e-4)
    return bool(one == other)


def _as_published(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _default_expand(config: RunConfig) -> str:
    large = config.model.variant == "mvitv2_large" and config.task == "image_classification"
    return "mlp" if large else "attention"


def _set_keys(path: Path) -> list[str]:
    """Return the keys that a recipe sets itself or by its base, joined by dots."""
    import yaml

    tree: Mapping[str, Any] = yaml.safe_load(path.read_text())
    base = tree.get("base")
    before = _set_keys(path.parent / str(base)) if base else []
    return list(dict.fromkeys([*before, *(key for key in flatten(tree) if not re.fullmatch("base", key))]))
