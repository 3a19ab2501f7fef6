"""Which flat ranges of each parameter's fp32 master and moments does this rank own, at any ZeRO stage?

Of a frozen parameter there is nothing but the weights themselves.

DeepSpeed keeps them in flat buffers whose layout differs between stages and world sizes. Seen as
(parameter name, start, count) they are the same everywhere, which makes checkpoints independent of both.
The attributes read here are private to DeepSpeed 0.19; pyproject.toml pins it and tests/mvit/test_zero_stages.py
guards every one of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
MOMENTUM = "momentum_buffer"  # SGD's
ALL_MOMENTS = (*MOMENTS, MOMENTUM)
EMA = "ema"
FROZEN = "frozen"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of one flattened parameter, as 1-D views into the live buffers.

    The views are fp32, except that a frozen parameter's only state is its weights in the type the model has.
    Writing into a view changes the training state. `replicated` means every rank holds the same elements (stage 0,
    and frozen parameters up to stage 2). `weights` are the same elements as the forward pass uses them.
    """

    name: str
    numel: int
    start: int
    states: dict[str, Tensor]
    replicated: bool
    weights: Tensor

    @property
    def frozen(self) -> bool:
        return not any(moment in self.states for moment in ALL_MOMENTS)

    @property
    def count(self) -> int:
        return self.states[MASTER].numel()

    def part(self, rank: int, world_size: int) -> "Fragment":
        """Return what `rank` writes: all of it, or its share when every rank holds the same elements."""
        if not self.replicated:
            return self
        low, high = self.count * rank // world_size, self.count * (rank + 1) // world_size
        states = {key: view[low:high] for key, view in self.states.items()}
        return Fragment(self.name, self.numel, self.start + low, states, False, self.weights[low:high])


@dataclass(frozen=True)
class ZeroLayout:
    """The parts of a DeepSpeed engine that hold training state."""

    stage: int
    zero: Any  # ZeRO's wrapper of the optimizer
    optimizer: torch.optim.Optimizer  # torch's AdamW or SGD
    flats: tuple[tuple[int, Tensor], ...]  # (group index, flat fp32 master); stage 0: one per parameter

    @classmethod
    def of(cls, engine: Any) -> "ZeroLayout":
        """Read the layout of a `DeepSpeedEngine`."""
        zero, stage = engine.optimizer, int(engine.zero_optimization_stage())
        if stage == 0:
            flats = [(index, p) for index, group in enumerate(zero.param_groups) for p in group["params"]]
            return cls(stage, zero, zero, tuple(flats))
        if stage == 3:
            assert not zero.swap_optimizer, "states on NVMe are not in memory"
            groups = [zero.sub_group_to_group_id[i] for i in range(len(zero.fp32_partitioned_groups_flat))]
            return cls(
                stage,
                zero,
                zero.optimizer,
                tuple(zip(groups, zero.fp32_partitioned_groups_flat, strict=True)),
            )
        assert not getattr(zero, "round_robin_gradients", False), "its fragment addresses are wrong"
        return cls(stage, zero, zero.optimizer, tuple(enumerate(zero.single_partition_of_fp32_groups)))

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of what the optimizer keeps of each element beside the master."""
        return (MOMENTUM,) if isinstance(self.optimizer, torch.optim.SGD) else MOMENTS

    def create_missing_state(self) -> None:
        """Give an optimizer that never stepped the zero state that stands for no step.

        AdamW's is what torch would create. SGD has no momentum before its first step, which zero is as good as: what it
        then puts there is zero times 0.9, plus the gradient.
        """
        for group_index, flat in self.flats:
            group, state = self.optimizer.param_groups[group_index], self.optimizer.state[flat]
            if len(state) == 0:
                on_device = group.get("fused") or group.get("capturable")
                # One step tensor each: sharing one would advance it once per flat buffer.
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
                for key in self.moments:
                    state[key] = torch.zeros_like(flat, requires_grad=False)

    def _views(self, flat: Tensor, at: int, count: int) -> dict[str, Tensor]:
        state = self.optimizer.state[flat]
        views = {MASTER: flat.data.view(-1).narrow(0, at, count)}
        return views | {key: state[key].view(-1).narrow(0, at, count) for key in self.moments}

    def fragments(self, module: torch.nn.Module) -> list[Fragment]:
        """List what this rank holds, frozen parameters included, in the order of `named_parameters`."""
        self.create_missing_state()
        find = self._trained if self.stage else self._trained_whole
        found = (find(name, p) if p.requires_grad else self._frozen(name, p) for name, p in module.named_parameters())
        return [fragment for fragment in found if fragment is not None]

    def _trained_whole(self, name: str, parameter: Any) -> Fragment:
        numel = parameter.numel()
        return Fragment(name, numel, 0, self._views(parameter, 0, numel), True, parameter.data.view(-1))

    def _trained(self, name: str, parameter: Any) -> Fragment | None:
        if self.stage == 3:
            sub_group, at, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = size * self.zero._get_param_partition_rank(parameter)
            count = min(size, parameter.ds_numel - start)  # the rest of the last partitions is padding
            if count <= 0:
                return None
            views = self._views(self.flats[sub_group][1], at, count)
            weights = parameter.ds_tensor.data.view(-1)[:count]
            return Fragment(name, parameter.ds_numel, start, views, False, weights)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        views = self._views(self.flats[mapping.param_group_index][1], address.start, address.numel)
        start = mapping.lp_fragment_address.start
        weights = parameter.data.view(-1).narrow(0, start, address.numel)
        return Fragment(name, parameter.numel(), start, views, False, weights)

    def _frozen(self, name: str, parameter: Any) -> Fragment | None:
        if self.stage < 3:
            weights = parameter.data.view(-1)
            return Fragment(name, parameter.numel(), 0, {MASTER: weights}, True, weights)
        size = parameter.ds_tensor.ds_numel
        start = size * self.zero._get_param_partition_rank(parameter)
        count = min(size, parameter.ds_numel - start)
        if count <= 0:
            return None
        weights = parameter.ds_tensor.data.view(-1)[:count]
        return Fragment(name, parameter.ds_numel, start, {MASTER: weights}, False, weights)

    def before_write(self) -> None:
        """Prepare for writing into fragments (stage 3: re-partition what is gathered now)."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()

    def after_write(self) -> None:
        """Carry what was written into the fragments over to the weights the forward pass uses (collective)."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            for sub_group in range(len(self.flats)):
                self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
            self.zero.checkpoint_event_epilogue()

    def group_steps(self) -> dict[str, int]:
        """Return how often each parameter group has been updated, by group name."""
        self.create_missing_state()
        steps: dict[str, set[int]] = {}
        for group_index, flat in self.flats:
            name = self.optimizer.param_groups[group_index]["name"]
            steps.setdefault(name, set()).add(int(self.optimizer.state[flat]["step"]))
        assert all(len(values) == 1 for values in steps.values()), steps
        return {name: values.pop() for name, values in steps.items()}

    def set_group_steps(self, steps: Mapping[str, int]) -> None:
        """Set every step counter; `steps` by group name."""
        for group_index, flat in self.flats:
            name = self.optimizer.param_groups[group_index]["name"]
            self.optimizer.state[flat]["step"].fill_(steps[name])

    def loss_scaler(self) -> dict[str, float]:
        """Return the state of the dynamic loss scale (fp16), else an empty dictionary."""
        scaler = getattr(self.zero, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {key: getattr(scaler, key) for key in _SCALER_FIELDS}

    def set_loss_scaler(self, state: Mapping[str, float]) -> None:
        """Restore what `loss_scaler` returned."""
        for key, value in state.items():
            setattr(self.zero.loss_scaler, key, value)


def with_ema(fragments: Sequence[Fragment], ema: Mapping[str, Tensor]) -> list[Fragment]:
    """Return `fragments` with this rank's part of the moving average as one more state."""
    if not ema:  # no average, or no share of it here
        return list(fragments)
    return [f if f.frozen else replace(f, states=f.states | {EMA: ema[f.name]}) for f in fragments]
