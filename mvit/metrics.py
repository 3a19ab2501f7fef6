"""What a run reports: TensorBoard curves that stay clean over restarts, metrics.jsonl, MFU."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

from mvit.config import RunConfig
from mvit.dashboard import COMPARED_FIGURES, compared_settings, layout, tag_of
from mvit.progress import ProgressDisplay

# Dense bf16/fp16 peaks in TFLOP/s from the makers' data sheets; the first name found in the device's name counts.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10": 125.0,
    "V100": 125.0,
}


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """Return the device's peak rate in FLOP/s: as configured, else the data sheet's, else None (a CPU, say)."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def forward_flops(model: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Count the floating-point operations (2 per multiply-add) of one forward pass of a meta-device model."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(input_shape, device="meta"))
    return float(counter.get_total_flops())


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest device memory allocated so far; on a CPU the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class RunLog:
    """Writes what rank zero reports; on other ranks it does nothing.

    A run that continues from step `first_step` drops later points of earlier attempts, so every curve is one line.
    """

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, active: bool, show_progress: bool) -> None:
        self._active, self._total = active, total_steps
        self._writer: Any = None
        self._display: ProgressDisplay | None = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._file = run_dir / "metrics.jsonl"
        _drop_records_after(self._file, first_step)
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        if show_progress:
            self._display = ProgressDisplay(total_steps=total_steps)
            self._display.__enter__()

    def config(self, config: RunConfig, *, world_size: int, mfu: bool) -> None:
        """Show the resolved config in TensorBoard, group the curves on a page, and list what runs are compared by."""
        if not self._active:
            return
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", "```yaml\n" + config.to_yaml() + "```", 0)
        self._writer.add_custom_scalars(layout(config, world_size=world_size, mfu=mfu))
        figures = {"train/loss": math.nan, COMPARED_FIGURES[config.task]: math.nan}
        for summary in hparams(compared_settings(config, world_size), figures):
            self._writer.file_writer.add_summary(summary)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text, its lines and columns as they are."""
        if self._active:
            self._writer.add_text(tag, "```\n" + text + "\n```", step)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Show figures by their tags, in TensorBoard alone."""
        if self._active:
            for tag, value in figures.items():
                self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show how values are spread."""
        if self._active:
            self._writer.add_histogram(tag, values, step)

    def images(self, images: Tensor, step: int, tag: str = "inputs/augmented") -> None:
        """Show (N, 3, H, W) images in [0, 1], as the model sees them or with what it predicts; strips in rows."""
        if self._active:
            height, width = images.shape[-2:]
            grid = make_grid(images.float().cpu(), nrow=max(1, min(8, 8 * height // width)), padding=4, pad_value=1.0)
            self._writer.add_image(tag, grid, step)

    def train(self, step: int, record: Mapping[str, float]) -> None:
        """Report one training record."""
        if not self._active:
            return
        for key, value in record.items():
            if (tag := tag_of(key)) is not None:
                self._writer.add_scalar(tag, value, step)
        self._write("train", step, record)

    def validation(self, step: int, figures: Mapping[str, float], prefix: str = "validation") -> None:
        """Report an evaluation."""
        if not self._active:
            return
        for key, value in figures.items():
            if key not in ("samples", "majority"):
                self._writer.add_scalar(f"{prefix}/{key}", value, step)
        self._write("evaluate" if prefix == "validation" else f"evaluate_{prefix.rsplit('_', 1)[-1]}", step, figures)
        self._writer.flush()

    def has_evaluation(self, step: int) -> bool:
        """Say whether an evaluation of this step is on record."""
        if not self._active or not self._file.is_file():
            return False
        records = (json.loads(line) for line in self._file.read_text().splitlines())
        return any(record["kind"] == "evaluate" and record["step"] == step for record in records)

    def saved(self, step: int, seconds: float, stalled_s: float, num_bytes: int) -> None:
        """Report a published checkpoint: seconds until it was published, and how many of them training waited."""
        if self._active:
            self._writer.add_scalar("checkpoint/save_seconds", seconds, step)
            self._writer.add_scalar("checkpoint/stall_seconds", stalled_s, step)
            self._write("save", step, {"seconds": seconds, "stall_seconds": stalled_s, "gib": num_bytes / 2**30})

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON has no infinity
        record = {"kind": kind, "step": step, "total_steps": self._total, "time": time.time(), **finite}
        with open(self._file, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self._display is not None:
            self._display.update(record)

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._writer.close()
            if self._display is not None:
                self._display.__exit__(None, None, None)


def _drop_records_after(file: Path, step: int) -> None:
    """Remove records of steps that will be done again, and a line cut short by a crash."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    part = file.with_suffix(".tmp")
    part.write_text("".join(kept))
    part.replace(file)
