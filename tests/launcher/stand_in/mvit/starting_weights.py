"""Stands in for the real module: which weights a run takes from another, and whether they fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainedWeights:
    checkpoint: Path
    step: int
    averaged: bool


def trained_weights(run_dir: Path, ranks: None) -> TrainedWeights:
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return TrainedWeights(newest, int(newest.name[5:]), averaged=True)


def check_start(before: Any, config: Any) -> None:
    if before.num_classes != config.num_classes:
        raise ValueError(f"{config.name}: num_classes={config.num_classes}, {before.name} has {before.num_classes}")
