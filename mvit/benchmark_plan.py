"""Measure how much memory the training step of a setting really takes, beside what the planner foresees.

Each setting trains in a process of its own with the engine and the losses of a real run, on random pixels: on a GPU by
torch's own counters, on a CPU by every allocation that torch's host allocator reports (which a test can repeat to the
byte) and by the process's resident memory (which has torch itself and the heap's gaps in it).
"""

import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from data_pipeline.synthetic import SyntheticBatches
from mvit import distributed
from mvit.config import RunConfig, parse_config
from mvit.distributed import RankInfo
from mvit.engine import Engine
from mvit.forecast import high_water_bytes
from mvit.optim import parameter_groups
from mvit.planner import foresee_memory
from mvit.planner_memory import Memory
from mvit.tasks import create_task

GIB = 2**30
_SPARE = 1.15  # of what is foreseen must be free before a setting is tried: others use this machine, too
_IMPORTED_BYTES = 3 * GIB // 4  # resident before the model: Python, torch, DeepSpeed


@dataclass(frozen=True)
class Measured:
    """What one process held: the most while the engine was built, and in the steps."""

    setup_bytes: int
    peak_bytes: int
    reserved_bytes: int
    """What the allocator asked the device for; on a CPU the growth of resident memory."""
    device_bytes: int | None
    """Everything that is taken of a GPU, the runtime too; None on a CPU."""
    step_seconds: float
    """Of the last step."""
    state_bytes: int
    """Of masters and moments: this rank's share."""


@dataclass(frozen=True)
class PlanRow:
    """One setting: foreseen and measured."""

    setting: str
    device: str
    foreseen_bytes: int
    """Peak of tensors."""
    needed_bytes: int
    """What the plan asks a GPU to have."""
    measured: Measured | None
    """None where it was not tried or did not end: see `told`."""
    off: float | None
    """Foreseen over measured, less 1: below 0 the plan was too hopeful."""
    told: str = ""
    memory: Memory | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)


def bench_plan(configs: Sequence[RunConfig], *, steps: int = 3) -> Iterator[PlanRow]:
    """Measure settings one after another on this machine; one that finds too little free memory is not tried."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for config in configs:
        memory = foresee_memory(config, 1, target=device)
        asked = memory.needed if device == "cuda" else int(memory.peak * _SPARE) + _IMPORTED_BYTES
        found = _in_a_process(config, steps, asked)
        measured, told = (None, found) if isinstance(found, str) else (found, "")
        off = None if measured is None else memory.peak / max(measured.peak_bytes, measured.setup_bytes) - 1
        yield PlanRow(_setting(config), device, memory.peak, memory.needed, measured, off, told, memory)


def settings(
    variants: Sequence[str],
    sizes: Sequence[Sequence[int]],
    micro_batches: Sequence[int],
    stages: Sequence[int],
    checkpointing: Sequence[str],
    precisions: Sequence[str],
    *,
    drop_path: float = 0.0,
    bucket_size: int | None = None,
) -> list[RunConfig]:
    """Return a recipe for every combination, one process each; `sizes` (H, W) of images or (T, H, W) of clips.

    Raises ConfigError for what no recipe may be.
    """
    bucket = {} if bucket_size is None else {"bucket_size": bucket_size}
    made = []
    for variant, size, micro, precision, stage, kept in itertools.product(
        variants, sizes, micro_batches, precisions, stages, checkpointing
    ):
        clip = len(size) == 3
        inputs: dict[str, Any] = {"mix_prob": 0.0, "image_size": tuple(size[-2:])}
        inputs |= {"num_frames": size[0]} if clip else {}
        values = {
            "name": "plan",
            "task": "video_classification" if clip else "image_classification",
            "video" if clip else "image": inputs,
            "model": {"variant": variant, "num_classes": 1000, "drop_path": drop_path},
            "train": {
                "global_batch_size": micro,
                "micro_batch_size": micro,
                "precision": precision,
                "activation_checkpointing": kept,
            },
            "zero": {"stage": stage} | bucket,
        }
        made.append(parse_config(values, source="mvit bench plan"))
    return made


def measure(config: RunConfig, ranks: RankInfo, steps: int = 3) -> Measured:
    """Train a recipe for some steps on random inputs and return what this rank held (collective)."""
    on_gpu = ranks.device.type == "cuda"
    gc.collect()  # what an earlier engine left would be released in the middle of the count
    resident = psutil.Process().memory_info().rss
    with host_allocations(active=not on_gpu) as host:
        torch.manual_seed(0)
        task = create_task(config)
        model = task.build_model()
        arithmetic = config.batch_arithmetic(ranks.world_size)
        engine = Engine(
            model,
            parameter_groups(model, config.optim, depth=sum(config.model.resolved_variant().depths)),
            config.optim,
            config.zero,
            precision=config.train.precision,
            micro_batch_size=arithmetic.micro_batch_size,
            accumulation_steps=arithmetic.accumulation_steps,
            ranks=ranks,
            compile_backend=None if config.train.compile == "off" else config.train.compile,
        )
        del model
        gc.collect()
        built_ns, setup = time.time_ns(), 0
        if on_gpu:
            setup = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        batches = iter(
            SyntheticBatches(config.input_size, config.model.num_classes, arithmetic.micro_batch_size, num_distinct=1)
        )
        began = 0.0
        for step in range(steps):
            began = time.perf_counter()
            engine.train()
            for _ in range(arithmetic.accumulation_steps):
                losses = task.losses(engine, next(batches).to(ranks.device), seed=step, dtype=engine.dtype)
                engine.backward(torch.stack(list(losses.values())).sum())
                del losses
            engine.update(1e-4)
            if on_gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        states = sum(s.numel() * s.element_size() for f in engine.fragments() for s in f.states.values())
        engine.close()
    if not on_gpu:
        return Measured(*host.peaks(built_ns), high_water_bytes() - resident, None, seconds, states)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return Measured(setup, peak, reserved, total - free, seconds, states)


class HostAllocations:
    """Every allocation and release that torch's host allocator reported."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []  # time in ns, bytes

    def peaks(self, split_ns: int) -> tuple[int, int]:
        """Return the most bytes held before, and from, a moment."""
        held, most = 0, [0, 0]
        for moment, size in sorted(self.events, key=lambda event: event[0]):
            held += size
            after = moment >= split_ns
            most[after] = max(most[after], held)
        return most[0], most[1]


@contextmanager
def host_allocations(*, active: bool) -> Iterator[HostAllocations]:
    """Record the host allocator inside the `with` block."""
    found = HostAllocations()
    if not active:
        yield found
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield found
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    events = inner.kineto_results.events()
    memory: list[Any] = [event for event in events if event.name() == "[memory]"]
    found.events = [(event.start_ns(), event.nbytes()) for event in memory]


def _in_a_process(config: RunConfig, steps: int, asked_bytes: int) -> Measured | str:
    """Measure in a new process: nothing of an earlier setting is left, and a killed one is told, not followed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_alone, config.to_yaml(), steps, asked_bytes).result()
        except BrokenProcessPool:
            return "killed: out of memory?"
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _measure_alone(text: str, steps: int, asked_bytes: int) -> Measured | str:
    import yaml

    os.environ["KINETO_LOG_LEVEL"] = "5"  # it reports the missing GPU otherwise
    ranks = distributed.start()
    try:
        on_gpu = ranks.device.type == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
        if asked_bytes > free:
            return f"not tried: {asked_bytes / GIB:.1f} GiB are asked for, {free / GIB:.1f} are free"
        return measure(parse_config(yaml.safe_load(text)), ranks, steps)
    finally:
        distributed.shutdown()


def _setting(config: RunConfig) -> str:
    train = config.train
    kept = train.activation_checkpointing
    recomputed = kept if isinstance(kept, str) else ",".join(kept)
    size = "x".join(map(str, config.input_size))
    step = f"{size} {train.precision} x {train.micro_batch_size}"
    return f"{config.model.variant} {step}, ZeRO-{config.zero.stage}, recomputed: {recomputed}"
