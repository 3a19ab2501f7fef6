"""Pure functions step → learning rate: linear warm-up, then cosine (paper B.2) or steps (B.3, detection)."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class ScheduleConfig(Settings):
    """Length of the training and shape of the learning rate; the rates are per `optim.lr_batch_size` samples."""

    epochs: float = Field(default=300, gt=0)
    """Passes over the training set."""
    warmup_epochs: float = Field(default=70, ge=0)
    """Epochs of linear growth from `warmup_lr`; the cosine begins after them."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in steps, as detection states it; takes the place of `warmup_epochs`."""
    shape: Literal["cosine", "steps"] = "cosine"
    """"steps": the peak rate, divided by 10 at each of `milestones`."""
    milestones: tuple[float, ...] = (0.88889, 0.96296)
    """With shape "steps": parts of the whole run after which the rate falls."""
    warmup_lr: float = Field(default=1e-8, ge=0)
    """Rate of the very first step, scaled with the batch like `optim.lr`."""
    end_lr: float = Field(default=1e-6, ge=0)
    """Rate the cosine ends at, scaled with the batch like `optim.lr`."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleConfig":
        if list(self.milestones) != sorted(self.milestones) or not all(0 < part < 1 for part in self.milestones):
            raise ValueError(f"milestones {self.milestones} must rise and lie between 0 and 1: parts of the run")
        if self.warmup_steps is None and self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} is longer than the training, epochs = {self.epochs}; "
                "lower warmup_epochs"
            )
        return self


def learning_rate(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    start: float,
    end: float,
    milestones: Sequence[float] | None = None,
) -> float:
    """Return the learning rate of update number `step` (1-based).

    The first update uses `start`, update `warmup_steps` + 1 uses `peak`; from there a half cosine leads to `end`,
    which would be reached one step after the last (the published code evaluates the curve before each update). With
    `milestones` the rate is `peak` instead, divided by 10 after each of these parts of the run, and `end` is not used.
    """
    done = step - 1
    if milestones is not None:
        fallen = sum(done >= int(part * total_steps) for part in milestones)
        peak = end = peak * 0.1**fallen
    if done < warmup_steps:
        return start + (peak - start) * done / warmup_steps
    progress = (done - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
