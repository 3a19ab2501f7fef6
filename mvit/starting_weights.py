"""What a run starts from: a weights file, or another run's last weights, the averaged ones where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from torch import Tensor

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
    from mvit.checkpoint_load import whole_state
    from mvit.distributed import on_main
    from mvit.evaluation import resolve_weights

    path = Path(source)
    if not on_main(path.is_dir, f"looking at {path}", ranks):
        return resolve_weights(path, ranks=ranks), str(source)
    trained = trained_weights(path, ranks)
    which = "averaged weights (EMA)" if trained.averaged else "last weights (it has no average)"
    # Nothing collective from here on: what fails now may fail on this rank alone.
    return dict(whole_state(trained.checkpoint, ema=trained.averaged)), f"the {which} of {trained.checkpoint}"


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
    if config.task == "detection" and before.task == "image_classification":
        _check_backbone(before, config)
        return
    if (config.task == "detection") != (before.task == "detection"):
        raise ConfigError(
            f"{config.name}: task {config.task} cannot start from {before.name}, which is of task {before.task}; "
            "image classifiers start detectors, there is no rule for the other ways"
        )
    if old.num_classes != new.num_classes and not new.new_head:
        raise ConfigError(
            f"{config.name}: model.num_classes = {new.num_classes}, but it starts from {before.name}, which has "
            f"{old.num_classes} classes; set model.new_head=true to start a new classifier, or "
            f"model.num_classes={old.num_classes}"
        )
    same = old.resolved_variant() == new.resolved_variant() and all(
        getattr(old, k) == getattr(new, k) for k in _SHAPING
    )
    if same and before.task == config.task:
        return
    if len(before.input_size) > len(config.input_size):
        raise ConfigError(
            f"{config.name}: classifies images, but it starts from {before.name}, which classifies clips; image "
            "weights can start a model of clips, there is no rule for the other way round"
        )
    theirs, ours = _parameters(before), _parameters(config)
    if len(before.input_size) < len(config.input_size):
        theirs = _inflated(theirs, ours, before, config)
    wrong = sorted(name for name in theirs.keys() | ours.keys() if _shape(theirs, name) != _shape(ours, name))
    if wrong:
        kinds = "" if before.task == config.task else "; for images and for clips null means another expand in large"
        raise ConfigError(
            f"{config.name}: its network cannot start from {before.name}: {len(wrong)} parameters differ, {wrong[0]} "
            f"for one; give both recipes the same model section (variant {old.variant} and {new.variant}){kinds}"
        )


def _check_backbone(before: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if the backbone of a detector cannot take the weights of an image classifier."""
    start = "pyramid.backbone."
    ours = {name.removeprefix(start): p for name, p in _parameters(config).items() if name.startswith(start)}
    theirs = _parameters(before)
    needed = [name for name in ours if "_norm." not in name or name.startswith("blocks.")]
    wrong = sorted(name for name in needed if _shape(ours, name) != _shape(theirs, name))
    if wrong:
        raise ConfigError(
            f"{config.name}: its backbone cannot start from {before.name}: {len(wrong)} parameters differ, {wrong[0]} "
            f"for one; give both the same variant ({before.model.variant} and {config.model.variant}) and model.expand"
        )


def _parameters(config: RunConfig) -> "dict[str, Tensor]":
    """Return the parameters of a recipe's network, without memory, but the head, which is judged by its classes."""
    import torch

    from mvit.tasks import create_task

    with torch.device("meta"):
        model: MViT = create_task(config).build_model()  # pyright: ignore[reportAssignmentType]
    return {name: p for name, p in model.named_parameters() if not name.startswith("head.projection.")}


def _inflated(
    theirs: "dict[str, Tensor]", ours: "dict[str, Tensor]", before: RunConfig, config: RunConfig
) -> "dict[str, Tensor]":
    """Return an image network's parameters once they are inflated for clips, and what then starts anew."""
    from mvit.model.inflation import inflate_state, starts_anew

    try:
        inflated, _ = inflate_state(theirs, ours, config.model.inflation)
    except ValueError as error:
        raise ConfigError(f"{config.name}: cannot start from {before.name}: {error}") from None
    return {name: parameter for name, parameter in ours.items() if starts_anew(name)} | inflated


def _shape(parameters: "dict[str, Tensor]", name: str) -> tuple[int, ...] | None:
    """Return a parameter's shape, () for the tables, which are resized, None if it is not there."""
    if name not in parameters:
        return None
    resized = any(part in name for part in ("rel_pos_", "pos_embed"))
    return () if resized else tuple(parameters[name].shape)
