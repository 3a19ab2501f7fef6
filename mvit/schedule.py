"""Pure functions step → learning rate: linear warm-up, then cosine (paper B.2, as the published code applies it)."""

import math

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class ScheduleConfig(Settings):
    """Length of the training and shape of the learning rate; the rates are per `optim.lr_batch_size` samples."""

    epochs: float = Field(default=300, gt=0)
    """Passes over the training set."""
    warmup_epochs: float = Field(default=70, ge=0)
    """Epochs of linear growth from `warmup_lr`; the cosine begins after them."""
    warmup_lr: float = Field(default=1e-8, ge=0)
    """Rate of the very first step, scaled with the batch like `optim.lr`."""
    end_lr: float = Field(default=1e-6, ge=0)
    """Rate the cosine ends at, scaled with the batch like `optim.lr`."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} is longer than the training, epochs = {self.epochs}; "
                "lower warmup_epochs"
            )
        return self


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, peak: float, start: float, end: float) -> float:
    """Return the learning rate of update number `step` (1-based).

    The first update uses `start`, update `warmup_steps` + 1 uses `peak`; from there a half cosine leads to `end`,
    which would be reached one step after the last (the published code evaluates the curve before each update).
    """
    done = step - 1
    if done < warmup_steps:
        return start + (peak - start) * done / warmup_steps
    progress = (done - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
