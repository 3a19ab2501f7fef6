"""What a run would do on so many GPUs, told before it is queued: batches, steps, rates, groups, checkpoints.

Needs neither data nor GPUs; the model is built without memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvit.checkpoint import predicted_bytes
from mvit.config import BatchArithmetic, ConfigError, RunConfig
from mvit.optim import num_moments, parameter_groups
from mvit.schedule import learning_rate

_SHOWN_EPOCHS = 12


@dataclass(frozen=True)
class EpochRate:
    """The learning rate at the first step of an epoch; `epoch` None: the last step of the run."""

    epoch: int | None
    step: int
    lr: float


@dataclass(frozen=True)
class GroupFacts:
    """Parameters that are updated alike."""

    name: str
    tensors: int
    elements: int
    weight_decay: float
    lr_scale: float
    peak_lr: float


@dataclass(frozen=True)
class CheckpointFacts:
    """What is saved."""

    bytes_each: int
    bytes_per_rank: float
    save_every: int | None
    """None: derived while training, from what steps, saves and failures cost."""
    number: int | None
    """Saves at that interval and at the end; None where the interval is derived."""
    kept: int
    """At most at a time, the one being written included."""
    disk_bytes: int


@dataclass(frozen=True)
class DryRun:
    """Everything that a job of `gpus` ranks would do; `as_dict()` for JSON, `str()` for people."""

    name: str
    gpus: int
    samples: int
    samples_from: str
    repeats: int
    batch: BatchArithmetic
    samples_per_rank_step: int
    samples_per_rank_epoch: float
    epochs: float
    total_steps: int
    steps_per_epoch: float
    warmup_steps: int
    evaluate_every: int
    evaluations: int
    num_parameters: int
    zero_stage: int
    precision: str
    rates: tuple[EpochRate, ...]
    groups: tuple[GroupFacts, ...]
    checkpoints: CheckpointFacts

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        again = f", each {self.repeats} times an epoch" if self.repeats > 1 else ""
        every = f"every {self.evaluate_every:,} steps" if self.evaluate_every else "at the end"
        lines = [
            f"{self.name} on {self.gpus} GPUs",
            f"data         {self.samples:,} samples ({self.samples_from}){again}",
            f"batch        {self.batch}",
            f"             a rank computes {self.samples_per_rank_step:,} samples a step, "
            f"{self.samples_per_rank_epoch:,.0f} an epoch",
            f"steps        {self.total_steps:,}: {self.epochs:g} epochs of {self.steps_per_epoch:,.1f}; "
            f"{self.warmup_steps:,} of warm-up",
            f"evaluations  {self.evaluations}, {every}",
            f"model        {self.num_parameters:,} parameters, ZeRO-{self.zero_stage}, {self.precision}",
            "",
            "learning rate at the first step of an epoch",
            "   epoch        step        rate",
        ]
        for rate in _spread(self.rates, self.warmup_steps):
            epoch = "end" if rate.epoch is None else str(rate.epoch)
            lines.append(f"  {epoch:>6}  {rate.step:>10,}  {rate.lr:>10.3e}")
        lines += ["", "parameters updated alike", "  group             tensors      elements     decay   peak rate"]
        for group in self.groups:
            lines.append(
                f"  {group.name:<16}  {group.tensors:>7,}  {group.elements:>12,}  {group.weight_decay:>8.3g}"
                f"  {group.peak_lr:>10.3e}"
            )
        saved = self.checkpoints
        often = "as often as measured costs make best, every half hour at least where saves are cheap"
        if saved.save_every is not None:
            often = f"every {saved.save_every:,} steps, {saved.number:,} in all"
        lines += [
            "",
            f"checkpoints  {_size(saved.bytes_each)} each, {_size(saved.bytes_per_rank)} a rank; {often}",
            f"             {saved.kept} on disk at most: {_size(saved.disk_bytes)}",
        ]
        return "\n".join(lines)


def dry_run(config: RunConfig, gpus: int, samples: int, samples_from: str) -> DryRun:
    """Return what `config` would do on `gpus` ranks with a training set of `samples`.

    Raises ConfigError if the batch does not divide or the run is shorter than a step.
    """
    import torch

    from mvit.tasks import create_task

    batch = config.batch_arithmetic(gpus)
    with torch.device("meta"):
        model = create_task(config).build_model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, warmup = config.total_steps(samples), config.warmup_steps(samples)
    each = config.epoch_size(samples)
    every = config.train.evaluate_every
    evaluations = (
        0 if config.data.validation is None else (total // every if every else 0) + bool(not every or total % every)
    )
    return DryRun(
        name=config.name,
        gpus=gpus,
        samples=samples,
        samples_from=samples_from,
        repeats=config.repeats,
        batch=batch,
        samples_per_rank_step=batch.micro_batch_size * batch.accumulation_steps,
        samples_per_rank_epoch=each / gpus,
        epochs=config.schedule.epochs,
        total_steps=total,
        steps_per_epoch=each / batch.global_batch_size,
        warmup_steps=warmup,
        evaluate_every=every,
        evaluations=evaluations,
        num_parameters=sum(sizes.values()),
        zero_stage=config.zero.stage,
        precision=config.train.precision,
        rates=_rates(config, total, warmup, each / batch.global_batch_size),
        groups=_groups(config, model, sizes),
        checkpoints=_checkpoints(config, gpus, total, sum(sizes.values())),
    )


def count_samples(config: RunConfig, given: int | None, published: Mapping[str, int]) -> tuple[int, str]:
    """Return the size of the training set and how it is known: as given, counted in its shards, or as published.

    `published` has data set → samples; a recipe's is the one whose name is a folder of data.train. Raises ConfigError
    if none of the three says it.
    """
    if given is not None:
        return given, "as given"
    spec = config.data.train
    if isinstance(spec, str) and (Path(spec) / "manifest.json").is_file():
        from data_pipeline.shards import open_shards

        return len(open_shards(spec, required=config.required_members)), f"counted in {spec}"
    named = next((name for name in published if isinstance(spec, str) and name in spec.split("/")), None)
    if named is None:
        raise ConfigError(
            f"data.train = {spec}: there is no packed folder here to count the samples in; give their number with "
            "--samples N"
        )
    return published[named], f"published for {named}; {spec} is not here"


def _rates(config: RunConfig, total: int, warmup: int, per_epoch: float) -> tuple[EpochRate, ...]:
    def lr_at(step: int) -> float:
        return learning_rate(
            step,
            total_steps=total,
            warmup_steps=warmup,
            peak=config.scaled_lr(config.optim.lr),
            start=config.scaled_lr(config.schedule.warmup_lr),
            end=config.scaled_lr(config.schedule.end_lr),
            milestones=config.schedule.milestones if config.schedule.shape == "steps" else None,
        )

    firsts = [int(epoch * per_epoch) + 1 for epoch in range(math.ceil(config.schedule.epochs))]
    rates = [EpochRate(epoch, step, lr_at(step)) for epoch, step in enumerate(firsts) if step <= total]
    return (*rates, EpochRate(None, total, lr_at(total)))


def _groups(config: RunConfig, model: Any, sizes: Mapping[str, int]) -> tuple[GroupFacts, ...]:
    peak = config.scaled_lr(config.optim.lr)
    depth = sum(config.model.resolved_variant().depths)
    return tuple(
        GroupFacts(
            name=group.name,
            tensors=len(group.parameter_names),
            elements=sum(sizes[name] for name in group.parameter_names),
            weight_decay=group.weight_decay,
            lr_scale=group.lr_scale,
            peak_lr=peak * group.lr_scale,
        )
        for group in parameter_groups(model, config.optim, depth=depth)
    )


def _checkpoints(config: RunConfig, gpus: int, total: int, elements: int) -> CheckpointFacts:
    train, optim = config.train, config.optim
    each = predicted_bytes(elements, ema=optim.ema_decay is not None, num_moments=num_moments(optim))
    number = None if train.save_every is None else total // train.save_every + bool(total % train.save_every)
    kept = train.keep_last + train.keep_best + (total // train.keep_every if train.keep_every else 0) + 1
    kept = kept if number is None else min(kept, number)
    return CheckpointFacts(each, each / gpus, train.save_every, number, kept, kept * each)


def _spread(rates: Sequence[EpochRate], warmup_steps: int) -> list[EpochRate]:
    """Return about a dozen of the rates: evenly spread, the first after the warm-up and the last among them."""
    stride = max(1, round(len(rates) / _SHOWN_EPOCHS))
    peak = next((number for number, rate in enumerate(rates) if rate.step > warmup_steps), 0)
    shown = {*range(0, len(rates), stride), peak, len(rates) - 1}
    return [rates[number] for number in sorted(shown)]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
