"""Stops a run whose loss or gradient norm is not finite, without waiting for the device at every step."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mvit.distributed import RankInfo, gather_objects


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm became infinite or NaN."""


class FiniteGuard:
    """Remembers on the device the first step whose loss or gradient norm was not finite.

    `check` reads it; called before every log record and every save, so that no checkpoint holds broken weights.
    """

    def __init__(self, ranks: RankInfo, *, watch_grad_norm: bool) -> None:
        self._ranks = ranks
        # fp16 overflows now and then on purpose, while the loss scale is looking for its level.
        self._watch_grad_norm = watch_grad_norm
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=ranks.device)  # loss, gradient norm
        self._keys: dict[int, list[str]] = {}

    def read_batch(self, step: int, keys: Sequence[str]) -> None:
        """Remember which samples this rank computes in `step`."""
        self._keys.setdefault(step, []).extend(keys)

    def watch(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Look at one step's values; does not wait for the device."""
        bad_loss = ~torch.isfinite(loss.detach())
        norm = grad_norm.to(bad_loss.device, non_blocking=True)
        bad_norm = ~torch.isfinite(norm) if self._watch_grad_norm else torch.zeros_like(bad_loss)
        bad = torch.stack([bad_loss, bad_norm])
        self._first_bad = torch.where((self._first_bad < 0) & bad, step, self._first_bad)

    def check(self, run_dir: Path, last_checkpoint: Path | None) -> None:
        """Raise NonFiniteError on every rank if any step since the last check was not finite (collective).

        The message names the step, the samples and the last good checkpoint; all keys go into a file of the run.
        """
        loss_step, norm_step = (int(v) for v in self._first_bad.tolist())
        mine = min((s for s in (loss_step, norm_step) if s >= 0), default=-1)
        everyone = gather_objects((mine, loss_step))
        bad_steps = [step for step, _ in everyone if step >= 0]
        if not bad_steps:
            self._keys.clear()
            return
        step = min(bad_steps)
        losses = [rank for rank, (_, at) in enumerate(everyone) if at == step]
        # The rank whose loss broke knows the samples; a norm that broke alone is every rank's.
        guilty = not losses or self._ranks.rank in losses
        keys = [key for some in gather_objects(self._keys.get(step, []) if guilty else []) for key in some]
        what = f"loss (rank {', '.join(map(str, losses))})" if losses else "gradient norm"
        file = run_dir / f"non_finite_step_{step:08d}.json"
        if self._ranks.is_main:
            file.write_text(json.dumps({"step": step, "what": what, "keys": keys}, indent=1))
        shown = ", ".join(keys[:8]) + (f", and {len(keys) - 8} more" if len(keys) > 8 else "")
        good = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {step}: the {what} is not finite; {good}. Samples: {shown} (all in {file}). Look at these samples, "
            "lower optim.lr, or use train.precision=bf16 or fp32 instead of fp16"
        )
