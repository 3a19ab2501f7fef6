"""Which ZeRO stage, activation checkpointing and micro-batch a recipe should take on given GPUs, and what that costs.

Needs no GPU, no Slurm, no DeepSpeed and no data. Memory comes from the recipe's real model (planner_trace) and from
what DeepSpeed allocates (planner_memory), time from a roofline (planner_time): modelled, not measured.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mvit.checkpoint import predicted_bytes
from mvit.config import ConfigError, RunConfig
from mvit.optim import num_moments
from mvit.planner_memory import GIB, LIVE_ELEMENTS, Memory, rank_memory
from mvit.planner_time import GPUS, Gpu, Ranks, StepTime, pass_seconds, step_seconds
from mvit.planner_trace import STAGES, StepTrace, Target, parameter_sizes, trace_step
from mvit.zero import uses_autocast

CHECKPOINTING: tuple[tuple[str, ...], ...] = tuple(STAGES[:count] for count in range(len(STAGES) + 1))
"""What is tried: nothing, then stage after stage; the early ones have the widest grids."""
PUBLISHED_SAMPLES = {
    "imagenet1k": 1_281_167,
    "imagenet21k": 13_154_800,
    "kinetics400": 240_436,
    "kinetics600": 392_622,
    "kinetics700": 545_317,
    "ssv2": 168_913,
}
"""Training samples of public data sets by the folder's name, for plans made where the data is not."""


@dataclass(frozen=True)
class Candidate:
    """One setting: what it needs, how fast it should be, and why it is not the choice."""

    zero_stage: int
    checkpointing: tuple[str, ...]
    micro_batch_size: int
    accumulation_steps: int
    memory: Memory
    step: StepTime
    fits: bool
    is_recipe: bool
    """The recipe's own setting."""
    verdict: str
    """"chosen", or why it is not."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to put behind a recipe to train like this."""
        stages = self.checkpointing
        kept = "off" if not stages else "all" if stages == STAGES else f"[{','.join(stages)}]"
        return (
            f"zero.stage={self.zero_stage}",
            f"train.activation_checkpointing={kept}",
            f"train.micro_batch_size={self.micro_batch_size}",
        )


@dataclass(frozen=True)
class Plan:
    """Everything that was compared, fastest first among what fits."""

    recipe: str
    gpus: int
    gpus_per_node: int
    gpu: str
    gpu_memory_gib: float
    precision: str
    global_batch_size: int
    num_parameters: int
    flops_per_sample: float
    """Useful work of forward and backward: what MFU counts."""
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    recipe_setting: Candidate | None
    """The recipe's own; None if its micro-batch does not divide the batch on so many GPUs."""
    total_steps: int | None
    samples: int | None
    samples_from: str
    checkpoint_bytes: int
    notes: tuple[str, ...]

    def hours(self, candidate: Candidate) -> float | None:
        """Return how long all steps take, without evaluations and waiting; None if the number of steps is unknown."""
        return None if self.total_steps is None else candidate.step.total * self.total_steps / 3600

    def mfu(self, candidate: Candidate) -> float:
        """Return the useful work per second as a share of the GPUs' dense matrix rate."""
        work = self.flops_per_sample * self.global_batch_size / self.gpus
        return work / candidate.step.total / (GPUS[self.gpu].matrix_tflops * 1e12)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values; times in seconds and hours, sizes in bytes."""

        plain = {key: value for key, value in vars(self).items() if not isinstance(value, (tuple, Candidate))}
        return plain | {
            "candidates": [self._row(one) for one in self.candidates],
            "chosen": None if self.chosen is None else self._row(self.chosen),
            "recipe_setting": None if self.recipe_setting is None else self._row(self.recipe_setting),
            "notes": list(self.notes),
        }

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        hours = self.hours(candidate)
        return asdict(candidate) | {
            "peak_bytes": candidate.memory.peak,
            "needed_bytes": candidate.memory.needed,
            "step_seconds": candidate.step.total,
            "mfu": self.mfu(candidate),
            "hours": hours,
            "gpu_hours": None if hours is None else hours * self.gpus,
            "overrides": candidate.overrides,
        }


def plan(
    config: RunConfig,
    gpus: int,
    gpu_memory_gib: float,
    gpu: str = "h100",
    *,
    gpus_per_node: int = 8,
    samples: int | None = None,
) -> Plan:
    """Compare all settings of a classification recipe on `gpus` GPUs of `gpu_memory_gib` GiB each.

    `samples` of the training set; None: those of the recipe's shards if they are here, else the published number.
    Raises ConfigError for a detector, an unknown GPU, a number of GPUs that the global batch cannot be divided among,
    or a precision the GPU does not have.
    """
    device = _check(config, gpus, gpu_memory_gib, gpu, gpus_per_node)
    sizes = parameter_sizes(config)
    ranks = Ranks(gpus, gpus_per_node, device)
    recipe_stages = tuple(sorted(config.train.checkpointed_stages))
    choices = [*CHECKPOINTING, *([] if recipe_stages in CHECKPOINTING else [recipe_stages])]
    stages = [stage for stage in range(4) if not (stage == 0 and _no_stage_0(config))]
    traces: dict[bool, StepTrace] = {}
    found: list[Candidate] = []
    for stage in stages:
        autocast = uses_autocast(config.zero.model_copy(update={"stage": stage}), config.train.precision)
        if autocast not in traces:
            traces[autocast] = trace_step(config, autocast=autocast)
        for recompute in choices:
            for micro in micro_batch_sizes(config, gpus):
                own = (config.zero.stage, recipe_stages, config.train.micro_batch_size) == (stage, recompute, micro)
                candidate = _candidate(config, ranks, sizes, traces[autocast], stage, recompute, micro)
                fits = candidate.memory.needed <= gpu_memory_gib * GIB
                found.append(replace(candidate, fits=fits, is_recipe=own))
    found.sort(key=lambda one: (not one.fits, one.step.total, one.memory.needed))
    chosen = found[0] if found[0].fits else None
    judged = tuple(replace(one, verdict=_verdict(one, chosen, gpu_memory_gib)) for one in found)
    count, origin = num_samples(config, samples)
    plain = next(iter(traces.values())).cost(1, (), backward=False)
    return Plan(
        recipe=config.name,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        gpu_memory_gib=gpu_memory_gib,
        precision=config.train.precision,
        global_batch_size=config.train.global_batch_size,
        num_parameters=sum(sizes),
        flops_per_sample=3 * float((plain.flops * plain.times).sum()),
        candidates=judged,
        chosen=None if chosen is None else judged[0],
        recipe_setting=next((one for one in judged if one.is_recipe), None),
        total_steps=None if count is None else config.total_steps(count),
        samples=count,
        samples_from=origin,
        checkpoint_bytes=predicted_bytes(
            sum(sizes), ema=config.optim.ema_decay is not None, num_moments=num_moments(config.optim)
        ),
        notes=_notes(config, gpus),
    )


def foresee(config: RunConfig, gpus: int, gpu: str = "h100", *, gpus_per_node: int = 8) -> Candidate:
    """Return what a classification recipe, as it stands, needs on `gpus` GPUs and how fast it should be.

    Takes a fraction of a plan's time. Raises ConfigError if the recipe cannot run there.
    """
    config.batch_arithmetic(gpus)
    device = _check(config, gpus, math.inf, gpu, gpus_per_node)
    autocast = uses_autocast(config.zero, config.train.precision)
    return _candidate(
        config,
        Ranks(gpus, gpus_per_node, device),
        parameter_sizes(config),
        trace_step(config, autocast=autocast, own_checkpointing=True),
        config.zero.stage,
        config.train.checkpointed_stages,
        config.train.micro_batch_size,
    )


def foresee_memory(config: RunConfig, gpus: int, *, target: Target = "cuda") -> Memory:
    """Return what a rank of a classification recipe, as it stands, holds on a GPU or on this machine's CPU."""
    autocast = uses_autocast(config.zero, config.train.precision)
    return rank_memory(
        config,
        parameter_sizes(config),
        trace_step(config, autocast=autocast, target=target, own_checkpointing=True),
        stage=config.zero.stage,
        recompute=config.train.checkpointed_stages,
        micro_batch_size=config.train.micro_batch_size,
        accumulation_steps=config.batch_arithmetic(gpus).accumulation_steps,
        world_size=gpus,
        target=target,
    )


def micro_batch_sizes(config: RunConfig, gpus: int) -> list[int]:
    """Return the micro-batches that make up the global batch exactly on `gpus` ranks, smallest first."""
    share = config.train.global_batch_size // gpus
    return [size for size in range(config.least_micro_batch, share + 1) if share % size == 0]


def _check(config: RunConfig, gpus: int, gpu_memory_gib: float, gpu: str, gpus_per_node: int) -> Gpu:
    if config.task == "detection":
        raise ConfigError(
            "task = detection: a detector's memory and time depend on the sizes of its pictures and on how many "
            "regions it looks at, which no plan knows; `mvit plan` is for the classification tasks. "
            "docs/detection.md has the published figures"
        )
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: unknown; choose from {', '.join(GPUS)}")
    for name, value in (("--gpus", gpus), ("--gpu-memory-gib", gpu_memory_gib), ("--gpus-per-node", gpus_per_node)):
        if not value > 0:  # NaN is not, either
            raise ConfigError(f"{name} {value:g} must be more than 0")
    if config.train.precision == "bf16" and not GPUS[gpu].bf16:
        raise ConfigError(f"train.precision = bf16: a {gpu} has no bf16 matrix units; set train.precision=fp16")
    total = config.train.global_batch_size
    if not micro_batch_sizes(config, gpus) or total % gpus:
        most = total // config.least_micro_batch
        fits = [count for count in range(1, most + 1) if total % count == 0 and micro_batch_sizes(config, count)]
        near = sorted(sorted(fits, key=lambda count: abs(math.log(count / gpus)))[:4])
        raise ConfigError(
            f"train.global_batch_size = {total} cannot be divided among {gpus} GPUs into micro-batches of at least "
            f"{config.least_micro_batch}: {total} / {gpus} = {total / gpus:.4g}; choose --gpus one of "
            f"{', '.join(map(str, near))}, or another train.global_batch_size"
        )
    return GPUS[gpu]


def _no_stage_0(config: RunConfig) -> bool:
    return config.train.precision == "fp16" or config.zero.offload_optimizer or config.zero.offload_parameters


def _candidate(
    config: RunConfig,
    ranks: Ranks,
    sizes: Sequence[int],
    trace: StepTrace,
    stage: int,
    recompute: tuple[str, ...],
    micro_batch_size: int,
) -> Candidate:
    precision, zero = config.train.precision, config.zero
    accumulation = config.train.global_batch_size // (micro_batch_size * ranks.count)
    memory = rank_memory(
        config,
        sizes,
        trace,
        stage=stage,
        recompute=recompute,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation,
        world_size=ranks.count,
    )
    compiled = config.train.compile == "inductor"
    forward, backward = (
        pass_seconds(trace.cost(micro_batch_size, recompute, backward=back), ranks.gpu, precision, compiled=compiled)
        for back in (False, True)
    )
    step = step_seconds(
        forward=forward,
        backward=backward,
        accumulation_steps=accumulation,
        ranks=ranks,
        stage=stage,
        num_parameters=sum(sizes),
        num_tensors=len(sizes),
        gradient_bytes=4 if precision == "fp32" or stage == 0 else 2,
        bucket_size=zero.bucket_size,
        overlap=zero.overlap_comm,
        live_elements=LIVE_ELEMENTS,
    )
    return Candidate(stage, recompute, micro_batch_size, accumulation, memory, step, False, False, "")


def _verdict(one: Candidate, chosen: Candidate | None, gpu_memory_gib: float) -> str:
    if not one.fits:
        return f"does not fit: needs {one.memory.needed / GIB:.1f} of {gpu_memory_gib:g} GiB"
    assert chosen is not None
    if one == chosen:
        return "chosen: the fastest that fits"
    slower = one.step.total / chosen.step.total - 1
    if slower >= 0.0005:
        return f"{slower:.1%} slower"
    return "as fast, but needs more memory" if one.memory.needed > chosen.memory.needed else "the same; one is enough"


def num_samples(config: RunConfig, samples: int | None) -> tuple[int | None, str]:
    """Return how many training samples there are, and how that is known."""
    if samples is not None:
        return samples, "as given"
    spec = config.data.train
    if spec is None:
        return None, "data.train is not set; give --samples N for hours"
    from data_pipeline.shards import ShardError, open_shards

    try:
        return len(open_shards(spec, required=config.required_members)), "counted in the shards"
    except (ShardError, OSError, ValueError):
        pass
    named = [name for name in PUBLISHED_SAMPLES if isinstance(spec, str) and name in spec.split("/")]
    if named:
        return PUBLISHED_SAMPLES[named[0]], f"published for {named[0]}; {spec} is not here"
    return None, f"{spec} is not here; give --samples N for hours"


def _notes(config: RunConfig, gpus: int) -> tuple[str, ...]:
    notes = ["times are modelled, not measured: data loading, evaluations and saves are not in them"]
    if config.train.compile != "off":
        notes.append(f"memory is that of the uncompiled model; train.compile={config.train.compile} should need less")
    if config.zero.offload_optimizer or config.zero.offload_parameters:
        notes.append("offloading's copies to the host and the update there are not in the times")
    if config.train.micro_batch_size not in micro_batch_sizes(config, gpus):
        notes.append(
            f"the recipe's train.micro_batch_size = {config.train.micro_batch_size} does not divide "
            f"{config.train.global_batch_size} samples over {gpus} GPUs: its own setting cannot run there"
        )
    return tuple(notes)
