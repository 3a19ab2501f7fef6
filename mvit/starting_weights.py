"""What a run starts from: a weights file, or another run's last weights, the averaged ones where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from mvit.distributed import RankInfo
    from mvit.model.backbone import MViT

_SHAPING = ("class_token", "expand", "absolute_positions", "relative_positions", "residual_pooling")


@dataclass(frozen=True)
class TrainedWeights:
    """The weights to take from a run."""

    checkpoint: Path
    step: int
    averaged: bool
    """Whether the moving average is there; then it is the one to take."""


def starting_weights(source: str | Path, ranks: "RankInfo | None" = None) -> tuple[str | Path | Mapping[str, Any], str]:
    """Return what `load_weights` takes, and words for the log, for a weights file, a run or a checkpoint folder.

    A folder with a moving average gives that. With `ranks`, all of them ask, and a run's newest valid checkpoint is
    looked for once (collective). Raises CheckpointError for what is none of the three.
    """
    from mvit.checkpoint_load import whole_weights
    from mvit.distributed import on_main
    from mvit.evaluation import resolve_weights

    path = Path(source)
    if not on_main(path.is_dir, f"looking at {path}", ranks):
        return resolve_weights(path, ranks=ranks), str(source)
    trained = trained_weights(path, ranks)
    which = "averaged weights (EMA)" if trained.averaged else "last weights (it has no average)"
    # Nothing collective from here on: what fails now may fail on this rank alone.
    return dict(whole_weights(trained.checkpoint, ema=trained.averaged)), f"the {which} of {trained.checkpoint}"


def trained_weights(run_dir: str | Path, ranks: "RankInfo | None" = None) -> TrainedWeights:
    """Return what a run has come to: its newest valid checkpoint; raises CheckpointError without one.

    With `ranks`, all of them ask, and the errors are raised on all (collective).
    """
    from mvit.checkpoint import read_manifest
    from mvit.distributed import on_main
    from mvit.evaluation import newest_checkpoint

    path = newest_checkpoint(run_dir, ranks)

    def read() -> TrainedWeights:
        manifest = read_manifest(path)
        return TrainedWeights(manifest.path, manifest.step, manifest.has_ema)

    return on_main(read, f"reading {path}", ranks)


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
