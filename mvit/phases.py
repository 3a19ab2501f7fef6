"""Phases of a run: it goes on at another resolution after some epochs, with the same global batch and one schedule."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from data_pipeline.settings import Settings
from mvit.train_config import StageName

if TYPE_CHECKING:
    from mvit.config import RunConfig


class PhaseConfig(Settings):
    """What changes in a later phase; null leaves it as in the phase before. Pictures are classified."""

    from_epoch: float = Field(gt=0)
    """It begins after so many epochs."""
    image_size: tuple[int, int]
    """(H, W) of the inputs; the position tables and what the optimizer knows of them are resized to it."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Of one rank; larger pictures want fewer at once. The global batch stays."""
    activation_checkpointing: Literal["off", "all"] | tuple[StageName, ...] | None = None
    evaluation_batch_size: int | None = Field(default=None, gt=0)


class Phase(NamedTuple):
    """One phase of a run over a set of known size."""

    number: int
    """From 0."""
    config: "RunConfig"
    """The run's recipe as this phase has it, without phases of its own."""
    end: int
    """Its last step."""


def check_phases(phases: Sequence[PhaseConfig], task: str, epochs: float) -> None:
    """Raise ValueError for phases that no run could go through."""
    if not phases:
        return
    if task != "image_classification":
        raise ValueError(
            f"phases are for task image_classification, this is {task}: train a run of its own at each size, from the "
            "one before (`mvit submit … --then …`)"
        )
    begins = [0.0, *(phase.from_epoch for phase in phases)]
    for number, (before, begin) in enumerate(pairwise(begins)):
        if not before < begin < epochs:
            raise ValueError(
                f"phases.{number}.from_epoch = {begin:g} must be more than {before:g}, where the phase before it "
                f"begins, and less than schedule.epochs = {epochs:g}"
            )


def phase_configs(config: "RunConfig") -> list["RunConfig"]:
    """Return the recipe as each phase has it, the first one first."""
    found = [config.model_copy(update={"phases": ()})]
    for phase in config.phases:
        given = {
            key: value
            for key in ("micro_batch_size", "activation_checkpointing", "evaluation_batch_size")
            if (value := getattr(phase, key)) is not None
        }
        before = found[-1]
        image = before.image.model_copy(update={"image_size": phase.image_size})
        found.append(before.model_copy(update={"image": image, "train": before.train.model_copy(update=given)}))
    return found


def phase_at(config: "RunConfig", step: int, num_samples: int) -> Phase:
    """Return the phase in which the step after `step` is done, of a run over `num_samples` training samples."""
    total = config.total_steps(num_samples)
    size, batch = config.epoch_size(num_samples), config.train.global_batch_size
    ends = [*(int(phase.from_epoch * size / batch) for phase in config.phases), total]
    number = next((number for number, end in enumerate(ends) if step < end), len(ends) - 1)
    return Phase(number, phase_configs(config)[number], ends[number])
