"""What a run starts from: a weights file, or another run's last weights, the averaged ones where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from mvit.model.backbone import MViT

_SHAPING = ("class_token", "expand", "absolute_positions", "relative_positions", "residual_pooling")


@dataclass(frozen=True)
class TrainedWeights:
    """The weights to take from a run."""

    checkpoint: Path
    step: int
    averaged: bool
    """Whether the moving average is there; then it is the one to take."""


def starting_weights(source: str | Path) -> tuple[str | Path | Mapping[str, Any], str]:
    """Return what `load_weights` takes, and words for the log, for a weights file, a run or a checkpoint folder.

    A folder with a moving average gives that. Raises CheckpointError for what is none of the three.
    """
    from mvit.evaluation import resolve_weights

    if not Path(source).is_dir():
        return resolve_weights(source), str(source)
    trained = trained_weights(source)
    which = "averaged weights (EMA)" if trained.averaged else "last weights (it has no average)"
    return resolve_weights(trained.checkpoint, ema=trained.averaged), f"the {which} of {trained.checkpoint}"


def trained_weights(run_dir: str | Path) -> TrainedWeights:
    """Return what a run has come to: its newest valid checkpoint; raises CheckpointError without one."""
    from mvit.checkpoint import read_manifest
    from mvit.evaluation import newest_checkpoint

    manifest = read_manifest(newest_checkpoint(run_dir))
    return TrainedWeights(manifest.path, manifest.step, manifest.has_ema)


def check_start(before: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if the weights that `before` trains cannot be what `config` starts from.

    Costs an import of torch only where the two networks are described differently.
    """
    old, new = before.model, config.model
    if old.num_classes != new.num_classes and not new.new_head:
        raise ConfigError(
            f"{config.name}: model.num_classes = {new.num_classes}, but it starts from {before.name}, which has "
            f"{old.num_classes} classes; set model.new_head=true to start a new classifier, or "
            f"model.num_classes={old.num_classes}"
        )
    same = old.resolved_variant() == new.resolved_variant()
    if same and all(getattr(old, key) == getattr(new, key) for key in _SHAPING):
        return
    theirs, ours = _parameters(before), _parameters(config)
    wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if wrong:
        raise ConfigError(
            f"{config.name}: its network cannot start from {before.name}: {len(wrong)} parameters differ, {wrong[0]} "
            f"for one; give both recipes the same model section (variant {old.variant} and {new.variant})"
        )


def _parameters(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return each parameter's shape, () for the tables that are resized; the head is judged by its classes."""
    import torch

    from mvit.tasks import create_task

    with torch.device("meta"):
        model: MViT = create_task(config).build_model()  # pyright: ignore[reportAssignmentType]
    resized = ("rel_pos_", "pos_embed")
    return {
        name: () if any(part in name for part in resized) else tuple(p.shape)
        for name, p in model.named_parameters()
        if not name.startswith("head.projection.")
    }
