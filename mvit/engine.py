"""The training engine: forward, backward and update under DeepSpeed; the only importer of deepspeed."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvit.distributed import RankInfo, logger
from mvit.fingerprint import fingerprint
from mvit.fragments import EMA, MASTER, Fragment, ZeroLayout, with_ema
from mvit.optim import OptimConfig, ParameterGroup, build_optimizer
from mvit.step_time import time_collectives
from mvit.zero import Precision, ZeroConfig, deepspeed_config, uses_autocast

_HYPERPARAMETERS = ("betas", "eps", "momentum", "nesterov")  # AdamW's, SGD's
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        # Chosen anyway, but with a warning on every rank.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.utils").logger.setLevel("ERROR")
    if device.type == "cpu":
        # Compiled at start otherwise (half a minute, sometimes a stall), and used by inference only.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A model sharded and trained by DeepSpeed; call it to run the forward pass.

    Construction and every method but `dtype` are collective: all ranks call them in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        optim: OptimConfig,
        zero: ZeroConfig,
        *,
        precision: Precision,
        micro_batch_size: int,
        accumulation_steps: int,
        ranks: RankInfo,
        compile_backend: str | None = None,
    ) -> None:
        deepspeed = _import_deepspeed(ranks.device)
        deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
        self.ranks, self.groups = ranks, tuple(groups)
        self._clip = optim.clip_grad_norm
        self._accumulation_steps = accumulation_steps
        self._micro_step = 0
        self._untime: Callable[[], None] = lambda: None
        model.to(ranks.device)
        on_gpu = ranks.device.type == "cuda" and not zero.offload_optimizer
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, groups, optim, fused=on_gpu),
            config=deepspeed_config(
                zero,
                precision=precision,
                micro_batch_size=micro_batch_size,
                accumulation_steps=accumulation_steps,
                clip_grad_norm=optim.clip_grad_norm,
                world_size=ranks.world_size,
            ),
            dist_init_required=False,
        )
        if compile_backend is not None:
            self._engine.compile(backend=compile_backend)
        self._lr_scales = {group.name: group.lr_scale for group in groups}
        autocast = uses_autocast(zero, precision)
        self.dtype = torch.float32 if autocast else _DTYPES[precision]
        """Type of the floating-point inputs the forward pass expects."""
        self.layout = ZeroLayout.of(self._engine)
        self._ema_decay = optim.ema_decay
        self._ema: dict[str, Tensor] = {}
        if self._ema_decay is not None:
            self._ema = {f.name: f.states[MASTER].clone() for f in self._own_fragments() if not f.frozen}

    @property
    def module(self) -> nn.Module:
        """The model itself; under stage 3 its parameters are partitioned."""
        return self._engine.module

    @property
    def has_ema(self) -> bool:
        return self._ema_decay is not None  # a rank without a share of the weights has none of the average either

    @property
    def skipped_steps(self) -> int:
        """Updates skipped because of fp16 overflow."""
        return int(self._engine.skipped_steps)

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; `loss` is divided by the number of accumulation steps here."""
        self._engine.backward(loss)
        self._micro_step += 1
        if self._micro_step % self._accumulation_steps:
            self._engine.step()  # counts the micro-batch; DeepSpeed updates at the boundary only

    def update(self, learning_rate: float) -> Tensor:
        """Clip, update the weights with `learning_rate` (times each group's scale) and clear the gradients.

        Returns the global gradient norm before clipping, a scalar tensor; reading it waits for the device.
        """
        assert self._micro_step % self._accumulation_steps == 0, "update in the middle of an accumulation"
        for group in self.layout.optimizer.param_groups:
            group["lr"] = learning_rate * self._lr_scales[group["name"]]
        if self.layout.stage == 0:
            limit = self._clip or float("inf")
            grad_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
            self._engine.step()
        else:
            self._engine.step()
            grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if self._ema_decay is not None:
            for fragment in self._own_fragments():
                if not fragment.frozen:
                    self._ema[fragment.name].lerp_(fragment.states[MASTER], 1 - self._ema_decay)
        return grad_norm.detach()

    def _own_fragments(self) -> list[Fragment]:
        return self.layout.fragments(self.module)

    def fragments(self) -> list[Fragment]:
        """Return this rank's part of the training state, moving average included."""
        return with_ema(self._own_fragments(), self._ema)

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's persistent buffers, the same on every rank."""
        kept = self.module.state_dict(keep_vars=True)
        return {name: kept[name] for name, _ in self.module.named_buffers() if name in kept}

    def replicas(self) -> dict[str, int]:
        """Return fingerprints of the weights that every rank holds whole: all of them up to stage 2, at 3 none."""
        if self.layout.stage == 3:
            return {}
        return {name: int(fingerprint(p.data.reshape(-1))) for name, p in self.module.named_parameters()}

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Return what the optimizer does with each parameter group, as it stands in the optimizer itself."""
        names = {group.name: list(group.parameter_names) for group in self.groups}
        return [
            {
                "name": group["name"],
                "parameters": names[group["name"]],
                "weight_decay": group["weight_decay"],
                **{key: list(group[key]) if key == "betas" else group[key] for key in _HYPERPARAMETERS if key in group},
                "lr_scale": self._lr_scales[group["name"]],
            }
            for group in self.layout.optimizer.param_groups
        ]

    def counters(self) -> dict[str, Any]:
        """Return what belongs to the training state besides fragments, JSON-able and the same on every rank."""
        return {
            "group_steps": self.layout.group_steps(),
            "skipped_steps": self.skipped_steps,
            "loss_scaler": self.layout.loss_scaler(),
        }

    @contextmanager
    def writing(self) -> Iterator[list[Fragment]]:
        """Give the fragments to write into; on leaving, the forward pass uses what was written (collective)."""
        self.layout.before_write()
        yield self.fragments()
        self.layout.after_write()

    def restore_counters(self, step: int, counters: Mapping[str, Any]) -> None:
        """Set the step counters to `step` updates and restore what `counters` returned."""
        self.layout.set_group_steps(counters["group_steps"])
        if counters["loss_scaler"]:
            self.layout.set_loss_scaler(counters["loss_scaler"])
        self._micro_step = step * self._accumulation_steps
        self._engine.global_steps = step
        self._engine.micro_steps = self._micro_step
        self._engine.global_samples = step * self._engine.train_batch_size()
        self._engine.skipped_steps = counters["skipped_steps"]

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Run the forward pass with the averaged weights inside the `with` block (collective).

        After an exception they stay: it may be this rank's alone, and swapping back would wait for the others for ever.
        """
        self._swap_ema()
        yield
        self._swap_ema()

    def _swap_ema(self) -> None:
        with self.writing() as fragments:
            for fragment in fragments:
                if fragment.frozen:
                    continue
                kept = fragment.states[MASTER].clone()
                fragment.states[MASTER].copy_(fragment.states[EMA])
                fragment.states[EMA].copy_(kept)

    def save_by_deepspeed(self, folder: Path) -> None:
        """Let DeepSpeed write its own checkpoint, for comparison in a benchmark; nothing here reads it (collective)."""
        self._engine.save_checkpoint(str(folder), tag="benchmark")

    def time_collectives(self, spent: Callable[[float], None]) -> None:
        """Tell `spent` the seconds of each collective of a step until the engine is closed; on CPUs alone.

        On CUDA the host does not wait inside them, so its clock would say nothing.
        """
        if self.ranks.device.type == "cpu":
            self._untime = time_collectives(importlib.import_module("deepspeed.comm.comm").cdb, spent)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model so that another engine may be built in this process."""
        self._untime()
        self._engine.destroy()
        logger.debug("engine closed")
