"""Measure models: time, memory and FLOPs of forward and training steps, side by side with other libraries' models."""

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mvit.benchmark_flops import forward_macs, matrix_rate, training_macs
from mvit.benchmark_peers import Peer, fitting_peers, published_classes, recompute
from mvit.variants import create_model

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # bf16: autocast over float32 parameters
PASSES = ("forward", "train")  # train: forward and backward, no optimizer


@dataclass(frozen=True)
class Measurement:
    """One contender in one setting. On the CPU `seconds` are process CPU seconds, on CUDA device time."""

    contender: str
    variant: str
    input_size: tuple[int, ...]
    """(H, W) of images or (T, H, W) of clips."""
    precision: str
    batch: int
    kind: str
    """"forward" or "train"."""
    seconds_min: float
    seconds_median: float
    wall_samples_per_s: float
    """Images or clips per wall-clock second, median round."""
    speedup: float | None
    """Seconds of the first peer (minimum over rounds) divided by this one's: above 1 is faster."""
    speedup_median: float | None
    """The same of the medians over rounds."""
    peak_mib: float | None
    """Memory above what was held before the call, in this kind of pass; None where it cannot be measured. Resident
    memory on the CPU: an upper bound that repeats within a quarter, allocated memory on CUDA."""
    gflops: float
    """Multiply-adds of one forward pass of one image or clip, in 1e9, as papers count FLOPs."""
    mfu: float
    """Model FLOPs of the pass per second (the fastest round's), as a part of the rate at which this device multiplied
    large matrices of this precision in this run. Recomputed activations and other forms' extra work do not count."""
    checkpointing: bool
    """Whether every block's activations were recomputed in the backward pass."""


def bench_model(
    variants: Sequence[str] = ("mvitv2_tiny",),
    input_sizes: Sequence[Sequence[int]] = ((224, 224),),
    precisions: Sequence[str] = ("fp32", "bf16"),
    batch: int = 4,
    *,
    against: Sequence[str] | None = None,
    forms: Sequence[str] = ("auto",),
    rounds: int = 5,
    checkpointing: Sequence[bool] = (False,),
    drop_path: float = 0.0,
    device: str | None = None,
    num_threads: int | None = None,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Time our models in each attention form, and their peers, taking turns in one process; return JSON-able rows.

    `against` None takes timm for images (H, W) and torchvision for clips (T, H, W): each has models of one kind, and
    one that has none of the input's kind is left out if another is there. "reference" is our model with the attention
    of the published code. "NAME=FILE.py:FUNCTION" is any other: FUNCTION(variant, input_size) returns the module.
    `checkpointing`: without, with, or both: every block recomputed in the backward pass, in the train pass.
    `drop_path`: the last block's rate of every contender that has drop path, rising linearly.
    Taking turns makes the ratios robust against other work on the machine; on the CPU so do CPU seconds instead of
    wall-clock time (with `num_threads=1` most so: waiting threads burn CPU time on a busy machine).
    Raises ValueError for an unknown precision, or a peer that is unknown or has no such model.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"cannot bench {precision!r}; choose from {list(PRECISIONS)}")
    peers = {len(size): fitting_peers(size, against) for size in input_sizes}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    rates = {
        name: matrix_rate(where, dtype or torch.float32) for name, dtype in PRECISIONS.items() if name in precisions
    }
    measurements: list[Measurement] = []
    for variant in variants:
        for size in (tuple(size) for size in input_sizes):
            macs = count_macs(variant, size)  # first of all: it refuses what no variant or input is, in our words
            contenders = _build(variant, size, peers[len(size)], forms, drop_path)
            for precision, recomputed in itertools.product(precisions, checkpointing):
                chosen = {name: model for name, model in contenders.items() if recompute(model, recomputed)}
                for kind in PASSES[1:] if recomputed else PASSES:
                    times = _take_turns(chosen, size, precision, batch, kind, rounds, where)
                    flops = 2 * batch * macs[kind]
                    theirs = next(iter(times.values()))[0] if peers[len(size)] else None
                    for name, (seconds, walls, peak) in times.items():
                        median, rate = statistics.median(seconds), batch / statistics.median(walls)
                        speedup = min(theirs) / min(seconds) if theirs else None
                        speedup_median = statistics.median(theirs) / median if theirs else None
                        mfu = flops / min(seconds) / rates[precision]
                        measurements.append(
                            Measurement(
                                name, variant, size, precision, batch, kind, min(seconds), median, rate,
                                speedup, speedup_median, peak, macs["forward"] / 1e9, mfu, recomputed,
                            )
                        )  # fmt: skip
    if show:
        print_table(measurements, where, rates)
    return [asdict(measurement) for measurement in measurements]


def _build(
    variant: str, size: tuple[int, ...], peers: Mapping[str, Peer], forms: Sequence[str], drop_path: float
) -> dict[str, nn.Module]:
    """Build every contender of one kind of input, peers first, since the first one is what others are compared to."""
    contenders = {name: peer.build(variant, size, drop_path) for name, peer in peers.items()}
    for form in forms:
        ours = create_model(variant, published_classes(size), size, drop_path=drop_path)
        ours.set_attention_form(form)
        contenders[f"mvit {form}"] = ours
    return contenders


def count_macs(variant: str, input_size: Sequence[int]) -> dict[str, int]:
    """Return the multiply-adds of one image's or clip's "forward" pass and of its "train" step (forward, backward)."""
    with torch.device("meta"):
        model = create_model(variant, published_classes(input_size), input_size)
    return {"forward": forward_macs(model, input_size), "train": training_macs(model, input_size)}


def print_table(measurements: Sequence[Measurement], device: torch.device, rates: Mapping[str, float]) -> None:
    """Print the measurements as a table."""
    unit = "CPU s" if device.type == "cpu" else "s"
    peak = ", ".join(f"{name} matrices {rate / 1e9:.0f} GFLOP/{unit}" for name, rate in rates.items())
    table = Table(title=f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads; {peak}")
    for header in ("model", "input", "GFLOPs", "precision", "pass", "batch", "contender"):
        table.add_column(header)
    for header in (f"{unit} min", f"{unit} median", "samples/s", "speed-up", "of medians", "MFU", "peak MiB"):
        table.add_column(header, justify="right")
    for m in measurements:
        kind = f"{m.kind}, recomputed" if m.checkpointing else m.kind
        shape = (m.variant, _text(m.input_size), f"{m.gflops:.2f}", m.precision, kind, str(m.batch), m.contender)
        numbers = (f"{m.seconds_min:.4f}", f"{m.seconds_median:.4f}", f"{m.wall_samples_per_s:.3g}")
        speedups = ["" if ratio is None else f"{ratio:.2f}" for ratio in (m.speedup, m.speedup_median)]
        peak = "" if m.peak_mib is None else f"{m.peak_mib:.0f}"
        table.add_row(*shape, *numbers, *speedups, f"{m.mfu:.0%}", peak)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own: rich would fold every column
        console = Console(width=170)
    console.print(table)


def _text(input_size: Sequence[int]) -> str:
    return "x".join(map(str, input_size))


def _take_turns(
    contenders: dict[str, nn.Module],
    input_size: tuple[int, ...],
    precision: str,
    batch: int,
    kind: str,
    rounds: int,
    device: torch.device,
) -> dict[str, tuple[list[float], list[float], float | None]]:
    """Run every contender once per round, after one round of warm-up that also measures memory."""
    inputs = torch.randn(batch, 3, *input_size, device=device)
    results: dict[str, tuple[list[float], list[float], float | None]] = {}
    for name, model in contenders.items():
        model.to(device).train(kind == "train")
        step = _step(model, inputs, precision, kind)
        step()
        results[name] = ([], [], peak_mib(model, step, device))
    for _ in range(rounds):
        for name, model in contenders.items():
            seconds, wall = timed(_step(model, inputs, precision, kind), device)
            results[name][0].append(seconds)
            results[name][1].append(wall)
    for model in contenders.values():
        model.zero_grad(set_to_none=True)
    return results


def _step(model: nn.Module, inputs: Tensor, precision: str, kind: str) -> Callable[[], None]:
    dtype = PRECISIONS[precision]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(kind == "train"),
            torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            loss = model(inputs).float().square().mean()
        if kind == "train":
            loss.backward()

    return step


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return (process CPU seconds or device seconds, wall seconds) of one step."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, time.perf_counter() - wall
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_mib(model: nn.Module, step: Callable[[], None], device: torch.device) -> float | None:
    """Return the peak memory of one step above what was held before: allocated on CUDA, resident on Linux."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What earlier steps freed is still resident: without handing it back, the growth would seem to be nothing
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None  # not Linux with glibc, or not allowed
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
