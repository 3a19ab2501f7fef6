"""Looks into a run that cost time and are therefore asked for: traces of steps, activations, attention, histograms."""

import gzip
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvit.distributed import RankInfo, gather_objects, logger
from mvit.engine import Engine
from mvit.fragments import MASTER
from mvit.metrics import RunLog
from mvit.model.attention import PoolingAttention
from mvit.model.block import Block
from mvit.train_config import ProfileConfig, WatchConfig

_HISTOGRAM_VALUES = 65536
"""At most so many of a block's weights, over all ranks."""
_ROWS = 30  # of a profile's table


class Watch:
    """Carries out what `profile` and `watch` ask for; costs nothing in other steps."""

    def __init__(
        self, profile: ProfileConfig, watch: WatchConfig, run_dir: Path, ranks: RankInfo, engine: Engine, log: RunLog
    ) -> None:
        self._profile, self._watch, self._run_dir = profile, watch, run_dir
        self._ranks, self._engine, self._log = ranks, engine, log
        self._profiler: Any = None

    def begin(self, first_step: int, total_steps: int) -> None:
        """Tell of what will not come about in the steps after `first_step`."""
        steps = self._profile.steps
        if steps is not None and not first_step < steps[0] <= total_steps:
            logger.warning(
                "profile.steps = %s: this goes on after step %d of %d, nothing is traced",
                list(steps),
                first_step,
                total_steps,
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Look at the step that is computed inside (collective where a histogram is due)."""
        if self._profile.steps is not None and self._ranks.is_main and step == self._profile.steps[0]:
            self._profiler = self._start_profiler()
        with torch.profiler.record_function(f"step {step}") if self._profiler is not None else ExitStack():
            yield
        if self._profiler is not None and self._profile.steps is not None and step >= self._profile.steps[1]:
            self._write_profile(step)
        if self._watch.histograms_every and step % self._watch.histograms_every == 0:
            self._write_histograms(step)

    @contextmanager
    def forward(self, step: int, accumulation: int) -> Iterator[None]:
        """Look at the activations of the forward pass inside, when they are due."""
        every = self._watch.activations_every
        if not every or step % every or accumulation or not self._ranks.is_main:
            yield
            return
        with looking_at(self._engine.module) as found:
            yield
        self._log.scalars({tag: float(value) for tag, value in found.items()}, step)

    def _start_profiler(self) -> Any:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities, profile_memory=self._profile.memory)
        profiler.start()
        return profiler

    def _write_profile(self, step: int) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        assert self._profile.steps is not None
        folder = self._run_dir / "profile"
        folder.mkdir(exist_ok=True)
        name = f"steps_{self._profile.steps[0]}_to_{step}"
        plain = folder / f"{name}.json"
        profiler.export_chrome_trace(str(plain))
        packed = folder / f"{name}.trace.json.gz"
        with plain.open("rb") as source, gzip.open(packed, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        order = "self_device_time_total" if self._ranks.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=48)
        (folder / f"{name}.txt").write_text(table + "\n")
        self._log.text("profile", table, step)
        logger.info("profile of %s: open %s at https://ui.perfetto.dev; the table is beside it", name, packed)

    def _write_histograms(self, step: int) -> None:
        """Show a sample of each block's weights, every rank's share of them (collective)."""
        samples: dict[str, list[Tensor]] = {}
        for fragment in self._engine.fragments():
            own = fragment.part(self._ranks.rank, self._ranks.world_size).states[MASTER]
            samples.setdefault(_place(fragment.name), []).append(own)
        most = max(1, _HISTOGRAM_VALUES // self._ranks.world_size)
        thinned = {}
        for place, parts in samples.items():
            every = max(1, -(-sum(part.numel() for part in parts) // most))
            thinned[place] = torch.cat([part[::every] for part in parts]).float().cpu().numpy()
        shares = gather_objects(thinned)
        if self._ranks.is_main:
            for place in sorted({place for share in shares for place in share}):
                values = [torch.from_numpy(share[place]) for share in shares if place in share]
                self._log.histogram(f"weights/{place}", torch.cat(values), step)


def _place(name: str) -> str:
    """Return the block that a parameter belongs to, or its module."""
    parts = name.split(".")
    if "blocks" in parts:
        return f"block{int(parts[parts.index('blocks') + 1]):02d}"
    return parts[0]


@contextmanager
def looking_at(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fill a dictionary with figures of each block in the forward pass inside: tag → scalar.

    `activation_rms` and `activation_max` of a block's output, `attention_entropy` (of the first sample; mean over heads
    and queries, as a share of that of uniform attention) and `attention_logit_max`. An entropy near 0 or logits that
    grow for ever announce a loss that breaks.
    """
    found: dict[str, Tensor] = {}
    blocks = [(_place(name), block) for name, block in model.named_modules() if isinstance(block, Block)]
    with ExitStack() as stack:
        for place, block in blocks:
            stack.enter_context(_removed(block.register_forward_hook(_output_hook(place, found))))
            for attention in block.modules():
                if isinstance(attention, PoolingAttention):
                    attention.probe = _attention_probe(place, found)
                    stack.callback(setattr, attention, "probe", None)
        yield found


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _output_hook(place: str, found: dict[str, Tensor]) -> Any:
    def look(block: nn.Module, inputs: Any, output: Any) -> None:
        values = output[0].detach().float()
        found[f"activation_rms/{place}"] = values.square().mean().sqrt()
        found[f"activation_max/{place}"] = values.abs().max()

    return look


def _attention_probe(place: str, found: dict[str, Tensor]) -> Any:
    def look(q: Tensor, k: Tensor) -> None:
        logits = (q[:1].detach() @ k[:1].detach().transpose(-2, -1)).float()  # (1, N, Lq, Lk)
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        found[f"attention_entropy/{place}"] = entropy / torch.tensor(float(logits.shape[-1])).log().to(entropy)
        found[f"attention_logit_max/{place}"] = logits.abs().max()

    return look
