"""What a run reports of its steps: gathered on the device between two records, summed over the ranks at a record."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from mvit import distributed
from mvit.config import RunConfig
from mvit.dashboard import PARAMETER_STAGES
from mvit.distributed import RankInfo
from mvit.engine import Engine
from mvit.fragments import MASTER
from mvit.metrics import peak_memory_gib
from mvit.model.convert import layer_index
from mvit.run_schedule import lr_at
from mvit.step_time import StepTimer, own_seconds, rates, slowest


class StepReport:
    """Gathers the figures of the steps since the last record; waits for the device in `record` alone."""

    def __init__(
        self,
        config: RunConfig,
        ranks: RankInfo,
        engine: Engine,
        *,
        total_steps: int,
        num_samples: int,
        peak_flops: float | None,
        flops_per_sample: float,
        logged_step: int,
        loss_sum: float,
    ) -> None:
        self._config, self._ranks, self._engine = config, ranks, engine
        self._total_steps, self._num_samples = total_steps, num_samples
        self._peak_flops, self._flops_per_sample = peak_flops, flops_per_sample
        self.logged_step = logged_step
        """The last step with a record; of those after it `loss_sum` is the sum."""
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float32, device=ranks.device)
        self.timer = StepTimer(ranks.device)
        engine.time_collectives(self.timer.communicated)
        self._named: dict[str, Tensor] = {}  # a task's several losses since the last record of this attempt
        self._chunks = 0
        self._norms = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # updates clipped, largest norm
        self._steps = 0
        self._log_began = self._window_s = 0.0
        self._log_share: float | None = None
        depths = config.model.resolved_variant().depths
        self._stages = {name: _stage_of(name, depths) for group in engine.groups for name in group.parameter_names}
        self._lr_scales = _lr_scales(engine, self._stages) if config.optim.layer_decay < 1 else {}

    def computed(self, loss: Tensor, losses: Mapping[str, Tensor], accumulation_steps: int) -> None:
        """Add the loss of a chunk, one of so many of its step, and what it is the sum of."""
        self.loss_sum += loss / accumulation_steps
        if len(losses) > 1:
            for name, part in losses.items():
                self._named[name] = self._named.get(name, 0) + part.detach()
        self._chunks += 1

    def updated(self, grad_norm: Tensor) -> None:
        """Count one update with its gradient norm before clipping; does not wait for the device."""
        norm = grad_norm.detach().to(self._norms, non_blocking=True)
        clip = self._config.optim.clip_grad_norm
        self._norms = torch.stack((self._norms[0] + (norm > clip if clip else 0), torch.maximum(self._norms[1], norm)))
        self._steps += 1
        self.timer.step()

    def record(self, step: int, grad_norm: Tensor, num_bad: int) -> dict[str, float]:
        """Return the figures of the steps since the last record (collective)."""
        steps, parts = self.timer.read()
        began = time.perf_counter()
        config, world = self._config, self._ranks.world_size
        speed = rates(steps, parts, config.train.global_batch_size)
        # Loss, bad samples and weights of all ranks, and what each needed by itself; speed is rank 0's.
        head = 2 + len(PARAMETER_STAGES)
        names = sorted(self._named)  # the same on every rank
        totals = torch.zeros(head + world + len(names), dtype=torch.float64, device=self._ranks.device)
        totals[0], totals[1] = self.loss_sum / (step - self.logged_step), num_bad
        totals[2:head] = self._squares()
        totals[head + self._ranks.rank] = own_seconds(parts)
        for place, name in enumerate(names, start=head + world):
            totals[place] = self._named[name] / self._chunks
        found = distributed.sum_over_ranks(totals).tolist()
        if step % config.train.log_every == 0:  # else a stop: the next attempt finishes the window
            self.loss_sum.zero_()
            self.logged_step = step
        lr = lr_at(config, step, total_steps=self._total_steps, num_samples=self._num_samples)
        clipped, largest = self._norms.tolist()
        record = {
            "loss": found[0] / world,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "grad_norm_max": largest,
            "memory_gib": peak_memory_gib(self._ranks.device),
            "bad_samples": found[1],
            "eta_s": (self._total_steps - step) * speed["step_seconds"],
            "epoch": step * config.train.global_batch_size / config.epoch_size(self._num_samples),
            **speed,
            **{f"loss_{name}": value / world for name, value in zip(names, found[head + world :], strict=True)},
            **(slowest(found[head : head + world]) if world > 1 else {}),
            **{
                f"weight_norm_{stage}": value**0.5 for stage, value in zip(PARAMETER_STAGES, found[2:head], strict=True)
            },
            **{f"lr_{stage}": lr * scale for stage, scale in self._lr_scales.items()},
        }
        if config.optim.clip_grad_norm and self._steps:
            record["clip_rate"] = clipped / self._steps
        if self._log_share is not None:
            record["log_share"] = self._log_share
        if self._peak_flops is not None and self._flops_per_sample:
            record["mfu"] = speed["samples_per_s"] * self._flops_per_sample / world / self._peak_flops
        if config.train.precision == "fp16":
            record["skipped_steps"] = self._engine.skipped_steps
        self._norms, self._steps = torch.zeros_like(self._norms), 0
        self._named, self._chunks = {}, 0
        self._log_began, self._window_s = began, sum(parts.values())
        return record

    def written(self) -> None:
        """Say that the record is written: what that cost, of the time of its steps, stands in the next one."""
        self._log_share = (time.perf_counter() - self._log_began) / max(self._window_s, 1e-9)
        self.timer.skip()

    def _squares(self) -> Tensor:
        """Sum the squares of this rank's own part of the weights by stage (6,)."""
        norms: list[list[Tensor]] = [[] for _ in PARAMETER_STAGES]
        for fragment in self._engine.fragments():
            if not fragment.frozen:
                own = fragment.part(self._ranks.rank, self._ranks.world_size).states[MASTER]
                norms[self._stages[fragment.name]].append(torch.linalg.vector_norm(own))
        nothing = torch.zeros(1, device=self._ranks.device)
        return torch.stack([torch.stack(some).square().sum() if some else nothing[0] for some in norms])


def _stage_of(name: str, depths: tuple[int, int, int, int]) -> int:
    """Return the index of a parameter's place in PARAMETER_STAGES."""
    layer = layer_index(name, sum(depths))
    if layer == 0 or layer > sum(depths):
        return 0 if layer == 0 else len(PARAMETER_STAGES) - 1
    return 1 + next(stage for stage in range(4) if layer <= sum(depths[: stage + 1]))


def _lr_scales(engine: Engine, stages: dict[str, int]) -> dict[str, float]:
    """Return the largest scale of the learning rate in each stage, that of its last block."""
    scales: dict[str, float] = {}
    for group in engine.groups:
        for name in group.parameter_names:
            stage = PARAMETER_STAGES[stages[name]]
            scales[stage] = max(scales.get(stage, 0.0), group.lr_scale)
    return scales
