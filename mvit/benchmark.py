"""Measure models: time, memory and FLOPs of forward and training steps, side by side with other libraries' models."""

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mvit.variants import create_model

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # bf16: autocast over float32 parameters
PASSES = ("forward", "train")  # train: forward and backward, no optimizer


@dataclass(frozen=True)
class Measurement:
    """One contender in one setting. On the CPU `seconds` are process CPU seconds, on CUDA device time."""

    contender: str
    variant: str
    resolution: int
    precision: str
    batch: int
    kind: str
    """"forward" or "train"."""
    seconds_min: float
    seconds_median: float
    wall_images_per_s: float
    """Images per wall-clock second, median round."""
    speedup: float | None
    """Seconds of the first peer (minimum over rounds) divided by ours: above 1 is faster."""
    peak_mib: float | None
    """Memory above what was held before the call, in this kind of pass; None where it cannot be measured. Resident
    memory on the CPU: an upper bound that repeats within a quarter, allocated memory on CUDA."""
    gflops: float
    """Multiply-adds of one forward pass of one image, in 1e9, as papers count FLOPs."""


def bench_model(
    variants: Sequence[str] = ("mvitv2_tiny",),
    resolutions: Sequence[int] = (224,),
    precisions: Sequence[str] = ("fp32", "bf16"),
    batch: int = 4,
    *,
    against: Sequence[str] = ("timm",),
    forms: Sequence[str] = ("auto",),
    rounds: int = 5,
    device: str | None = None,
    num_threads: int | None = None,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Time our models in each attention form, and their peers, taking turns in one process; return JSON-able rows.

    Taking turns makes the ratios robust against other work on the machine; on the CPU so do CPU seconds instead of
    wall-clock time (with `num_threads=1` most so: waiting threads burn CPU time on a busy machine).
    Raises ValueError for an unknown precision or peer.
    """
    for name, known in (*((p, PRECISIONS) for p in precisions), *((a, _PEERS) for a in against)):
        if name not in known:
            raise ValueError(f"cannot bench {name!r}; choose from {list(known)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    measurements: list[Measurement] = []
    for variant in variants:
        for resolution in resolutions:
            contenders = {peer: _PEERS[peer](variant, resolution) for peer in against}
            for form in forms:
                ours = create_model(variant, input_size=(resolution, resolution))
                ours.set_attention_form(form)
                contenders[f"mvit {form}"] = ours
            gflops = count_gflops(variant, resolution)
            for precision in precisions:
                for kind in PASSES:
                    times = _take_turns(contenders, resolution, precision, batch, kind, rounds, where)
                    reference = min(times[against[0]][0]) if against else None
                    for name, (seconds, walls, peak) in times.items():
                        speedup = reference / min(seconds) if reference else None
                        median, rate = statistics.median(seconds), batch / statistics.median(walls)
                        measurements.append(
                            Measurement(
                                name, variant, resolution, precision, batch, kind,
                                min(seconds), median, rate, speedup, peak, gflops,
                            )
                        )  # fmt: skip
    if show:
        print_table(measurements, where)
    return [asdict(measurement) for measurement in measurements]


def count_gflops(variant: str, resolution: int) -> float:
    """Return the multiply-adds of one image's forward pass in 1e9, counted on the meta device."""
    with torch.device("meta"):
        model = create_model(variant, input_size=(resolution, resolution)).eval()
        model.set_attention_form("reference")  # the folded forms count their extra columns
        images = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2e9


def print_table(measurements: Sequence[Measurement], device: torch.device) -> None:
    """Print the measurements as a table."""
    unit = "CPU s" if device.type == "cpu" else "s"
    table = Table(title=f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for header in ("model", "px", "GFLOPs", "precision", "pass", "batch", "contender"):
        table.add_column(header)
    for header in (f"{unit} min", f"{unit} median", "images/s", "speed-up", "peak MiB"):
        table.add_column(header, justify="right")
    for m in measurements:
        shape = (m.variant, str(m.resolution), f"{m.gflops:.2f}", m.precision, m.kind, str(m.batch), m.contender)
        numbers = (f"{m.seconds_min:.4f}", f"{m.seconds_median:.4f}", f"{m.wall_images_per_s:.1f}")
        speedup = "" if m.speedup is None else f"{m.speedup:.2f}"
        peak = "" if m.peak_mib is None else f"{m.peak_mib:.0f}"
        table.add_row(*shape, *numbers, speedup, peak)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own: rich would fold every column
        console = Console(width=140)
    console.print(table)


def _timm_model(variant: str, resolution: int) -> nn.Module:
    import timm

    return timm.create_model(variant, img_size=resolution)


_PEERS: dict[str, Callable[[str, int], nn.Module]] = {"timm": _timm_model}


def _take_turns(
    contenders: dict[str, nn.Module],
    resolution: int,
    precision: str,
    batch: int,
    kind: str,
    rounds: int,
    device: torch.device,
) -> dict[str, tuple[list[float], list[float], float | None]]:
    """Run every contender once per round, after one round of warm-up that also measures memory."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    results: dict[str, tuple[list[float], list[float], float | None]] = {}
    for name, model in contenders.items():
        model.to(device).train(kind == "train")
        step = _step(model, images, precision, kind)
        step()
        results[name] = ([], [], _peak_mib(model, step, device))
    for _ in range(rounds):
        for name, model in contenders.items():
            seconds, wall = _timed(_step(model, images, precision, kind), device)
            results[name][0].append(seconds)
            results[name][1].append(wall)
    for model in contenders.values():
        model.zero_grad(set_to_none=True)
    return results


def _step(model: nn.Module, images: Tensor, precision: str, kind: str) -> Callable[[], None]:
    dtype = PRECISIONS[precision]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(kind == "train"),
            torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            loss = model(images).float().square().mean()
        if kind == "train":
            loss.backward()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
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


def _peak_mib(model: nn.Module, step: Callable[[], None], device: torch.device) -> float | None:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m mvit.benchmark")
    parser.add_argument("what", choices=["model"])
    parser.add_argument("--variants", nargs="+", default=["mvitv2_tiny"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[224])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--against", nargs="*", default=["timm"], choices=list(_PEERS))
    parser.add_argument("--forms", nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, help="CPU threads; 1 gives the steadiest ratios")
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of a table")
    args = parser.parse_args(arguments)
    rows = bench_model(
        args.variants,
        args.resolutions,
        args.precisions,
        args.batch,
        against=args.against,
        forms=args.forms,
        rounds=args.rounds,
        num_threads=args.num_threads,
        show=not args.json,
    )
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
