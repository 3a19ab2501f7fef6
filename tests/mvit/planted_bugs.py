"""Bugs of resuming, planted into a rank's process by replacing what the library does; each is undone afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mvit.engine
import mvit.fragments
import mvit.run_checkpoints
import mvit.trainer
from data_pipeline.loader import TrainLoader
from data_pipeline.order import Stream, derive_seed
from mvit.engine import Engine
from mvit.fragments import EMA, MASTER, MOMENTS, ZeroLayout
from mvit.run_checkpoints import RunCheckpoints

_REAL = {
    "augmentation_seed": Stream.augmentation_seed,
    "start": TrainLoader.start,
    "loader": TrainLoader.__init__,
    "lr": mvit.trainer._Run._lr_at,
    "counters": Engine.restore_counters,
    "engine": Engine.__init__,
    "deepspeed_config": mvit.engine.deepspeed_config,
}


def _after_loading(patch: pytest.MonkeyPatch, spoil: Callable[[Engine], None]) -> None:
    """Let `spoil` change the state between loading and the checks."""

    def restore_counters(self: Engine, *args: Any) -> None:
        _REAL["counters"](self, *args)
        spoil(self)

    patch.setattr(Engine, "restore_counters", restore_counters)


def rng_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mvit.run_checkpoints, "load_rng", lambda manifest, rank: {})


def lr_off_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mvit.trainer._Run, "_lr_at", lambda self, step: _REAL["lr"](self, step - 1))


def lr_of_another_length(patch: pytest.MonkeyPatch) -> None:
    def lr_at(self: Any, step: int) -> float:
        total, self.total_steps = self.total_steps, self.total_steps + 5
        try:
            return _REAL["lr"](self, step)
        finally:
            self.total_steps = total

    patch.setattr(mvit.trainer._Run, "_lr_at", lr_at)


def average_restarted(patch: pytest.MonkeyPatch) -> None:
    def spoil(engine: Engine) -> None:
        for f in engine.fragments():
            f.states[EMA].copy_(f.states[MASTER])

    _after_loading(patch, spoil)


def cursor_counts_prefetched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrainLoader, "start", lambda self, step=0: _REAL["start"](self, step + 1))


def moments_of_one_group_swapped(patch: pytest.MonkeyPatch) -> None:
    def spoil(engine: Engine) -> None:
        members = engine.groups[1].parameter_names
        for f in engine.fragments():
            if f.name in members:
                first, second = (f.states[moment] for moment in MOMENTS)
                kept = first.clone()
                first.copy_(second)
                second.copy_(kept)

    _after_loading(patch, spoil)


def moments_not_restored(patch: pytest.MonkeyPatch) -> None:
    def spoil(engine: Engine) -> None:
        for f in engine.fragments():
            f.states[MOMENTS[1]].zero_()

    _after_loading(patch, spoil)


def step_count_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ZeroLayout, "set_group_steps", lambda self, steps: None)


def step_tensor_shared(patch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's own loading does: the count advances once per flat buffer."""

    def spoil(engine: Engine) -> None:
        layout = engine.layout
        shared = layout.optimizer.state[layout.flats[0][1]]["step"]
        for _, flat in layout.flats:
            layout.optimizer.state[flat]["step"] = shared

    _after_loading(patch, spoil)


def forward_weights_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ZeroLayout, "after_write", lambda self: None)


def masters_rounded(patch: pytest.MonkeyPatch) -> None:
    def spoil(engine: Engine) -> None:
        for _, flat in engine.layout.flats:
            flat.data.copy_(flat.data.bfloat16())

    _after_loading(patch, spoil)


def weight_decay_copied(patch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's universal checkpoints do: group 0's settings go to all groups."""

    def spoil(engine: Engine) -> None:
        groups = engine.layout.optimizer.param_groups
        for group in groups:
            group["weight_decay"] = groups[-1]["weight_decay"]

    _after_loading(patch, spoil)


def augmentation_seeded_by_attempt(patch: pytest.MonkeyPatch) -> None:
    def seed(self: Stream, position: int, epoch: int, sample_id: int) -> int:
        return derive_seed(_REAL["augmentation_seed"](self, position, epoch, sample_id), "attempt 2")

    patch.setattr(Stream, "augmentation_seed", seed)


def step_seed_begins_again(patch: pytest.MonkeyPatch) -> None:
    def chunk_seed(self: Any, step: int, accumulation: int) -> int:
        chunk = accumulation * self.ranks.world_size + self.ranks.rank
        return derive_seed(self.config.seed, "step", step - self.first_step, chunk)

    patch.setattr(mvit.trainer._Run, "_chunk_seed", chunk_seed)


def clipping_lost(patch: pytest.MonkeyPatch) -> None:
    def unclipped(zero: Any, **settings: Any) -> dict[str, Any]:
        return _REAL["deepspeed_config"](zero, **{**settings, "clip_grad_norm": 0.0})

    patch.setattr(mvit.engine, "deepspeed_config", unclipped)


def shards_exchanged(patch: pytest.MonkeyPatch) -> None:
    """Each of the two ranks goes on with the other's part."""

    def spoil(engine: Engine) -> None:
        for _, flat in engine.layout.flats:
            state = engine.layout.optimizer.state[flat]
            for values in (flat.data, *(state[moment] for moment in MOMENTS)):
                parts = [torch.empty_like(values) for _ in range(2)]
                dist.all_gather(parts, values)
                values.copy_(parts[1 - engine.ranks.rank])
        engine.layout.after_write()

    _after_loading(patch, spoil)


def order_reshuffled(patch: pytest.MonkeyPatch) -> None:
    def init(self: TrainLoader, *args: Any, seed: int, **settings: Any) -> None:
        _REAL["loader"](self, *args, seed=seed + 1, **settings)

    patch.setattr(TrainLoader, "__init__", init)


def average_decays_otherwise(patch: pytest.MonkeyPatch) -> None:
    def init(self: Engine, *args: Any, **settings: Any) -> None:
        _REAL["engine"](self, *args, **settings)
        self._ema_decay = 0.8

    patch.setattr(Engine, "__init__", init)


def one_weight_off_by_a_bit(patch: pytest.MonkeyPatch) -> None:
    def spoil(engine: Engine) -> None:
        if engine.ranks.rank == 1:
            engine.layout.flats[0][1].data.view(torch.int32)[3] ^= 1

    _after_loading(patch, spoil)


def checks_off(patch: pytest.MonkeyPatch) -> None:
    """Let a run train on from whatever was loaded."""
    patch.setattr(mvit.run_checkpoints, "check_loaded", lambda *args: None)
    patch.setattr(RunCheckpoints, "_check_counters", lambda *args: None)
    patch.setattr(TrainLoader, "check_state", lambda *args: None)


@dataclass(frozen=True)
class Bug:
    """A planted bug, what the trace must say of it, and what the run's own checks must."""

    plant: Callable[[pytest.MonkeyPatch], None]
    kind: str
    at_start: bool
    told: str
    """Part of the report."""
    refusal: str = ""
    """Part of the error with which the run refuses to train; empty if only the trace can know."""


BUGS = (
    Bug(rng_not_restored, "rng", True, "random state was not restored"),
    Bug(lr_off_by_one, "lr", False, "schedule is off by one step (behind)"),
    Bug(lr_of_another_length, "lr", False, "computed from other numbers"),
    Bug(average_restarted, "ema", True, "average began again at the weights", "ema of "),
    Bug(cursor_counts_prefetched, "sample", False, "the data cursor is off by one step (ahead)"),
    Bug(moments_of_one_group_swapped, "exp_avg", True, "belongs to exp_avg_sq", "exp_avg of "),
    Bug(moments_not_restored, "exp_avg_sq", True, "it is zero", "exp_avg_sq of "),
    Bug(step_count_not_restored, "counter", True, "step count of group", "group_steps is"),
    Bug(step_tensor_shared, "counter", False, "did not advance by one"),
    Bug(
        forward_weights_stale, "weights", True, "does not use the weights that were loaded", "weights that the forward"
    ),
    Bug(masters_rounded, "fp32", True, "rounded to the precision of the forward pass", "fp32 of "),
    Bug(weight_decay_copied, "hyperparameter", True, "weight_decay of group", "weight_decay of parameter group"),
    Bug(augmentation_seeded_by_attempt, "input", False, "augmented otherwise"),
    Bug(step_seed_begins_again, "rng", False, "were seeded otherwise"),
    Bug(clipping_lost, "exp_avg", False, "gradient clipping"),
    Bug(shards_exchanged, "exp_avg", True, "of another place or rank", "fp32 of "),
    Bug(order_reshuffled, "sample", False, "another seed", "seed was 0, is 1"),
    Bug(average_decays_otherwise, "ema", False, "optim.ema_decay has changed"),
    Bug(one_weight_off_by_a_bit, "fp32", True, "rank 1", "fp32 of "),
)


@contextmanager
def planted(bug: Bug, *, checks: bool) -> Iterator[None]:
    """Run the block with the bug in this process, and with or without the checks of a resume."""
    with pytest.MonkeyPatch.context() as patch:
        bug.plant(patch)
        if not checks:
            checks_off(patch)
        yield
