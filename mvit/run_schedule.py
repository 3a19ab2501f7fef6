"""The learning rate of each step of a run, from its recipe."""

from mvit.config import RunConfig
from mvit.schedule import learning_rate


def lr_at(config: RunConfig, step: int, *, total_steps: int, num_samples: int) -> float:
    """Return the rate of update `step` (from 1) for parameters whose scale is 1."""
    return learning_rate(
        step,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps(num_samples),
        peak=config.scaled_lr(config.optim.lr),
        start=config.scaled_lr(config.schedule.warmup_lr),
        end=config.scaled_lr(config.schedule.end_lr),
        milestones=config.schedule.milestones if config.schedule.shape == "steps" else None,
    )
