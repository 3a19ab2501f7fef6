"""The linear layer of every model: how it starts, and which library multiplies on the CPU."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape legend: M rows of the input (all axes but the last), K input channels, O output channels.

ONEDNN_ENV = "MVIT_ONEDNN_LINEAR"
"""Environment variable: "1" takes oneDNN for fp32 linears on the CPU, "0" what torch takes (MKL); not set: by CPU."""

_AMD_ZEN5 = 26  # the first family, as the kernel counts them, with 512-bit wide arithmetic
_log = logging.getLogger(__name__)


class Linear(nn.Linear):
    """A linear layer that starts as published: truncated normal of std 0.02, bias 0.

    The values are set in `reset_parameters`, inside the constructor, because DeepSpeed's `zero.Init` shards a
    module's parameters as soon as its constructor returns: a later `model.apply(init)` would see empty tensors.
    """

    def reset_parameters(self) -> None:
        """Draw new values."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, O)."""
        if _takes_onednn(input, self.weight) and onednn_is_chosen():
            return _OneDnnLinear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]
        return F.linear(input, self.weight, self.bias)


@functools.cache
def onednn_is_chosen() -> bool:
    """Tell whether fp32 linears on the CPU go through oneDNN, decided once per process.

    MKL, which torch takes, leaves AMD's CPUs with 512-bit arithmetic half idle (Zen 5: 1.5 times the CPU seconds of a
    whole training step); on Zen 4 and older, whose units are half as wide, the two are level. The choice is made by the
    CPU's family and not by a stop-watch: a job that goes on after a crash must get the same numbers, and so must all
    ranks on nodes of one kind.
    """
    asked = os.environ.get(ONEDNN_ENV, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{ONEDNN_ENV}={asked!r} must be 1 (oneDNN), 0 (what torch takes) or unset (by CPU)")
    if asked == "0" or (not asked and not _is_zen5(_cpu_lines())):
        return False
    works = _onednn_works()
    if not works:
        _log.warning("%s: this torch has no usable oneDNN linear; fp32 linears stay with MKL", ONEDNN_ENV)
    return works


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN could compute this: plain fp32 on the CPU, outside autocast, tracing and transforms."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # they have their own idea
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0  # who counts or fakes operations knows the public ones
    )


def _is_zen5(cpu: dict[str, str]) -> bool:
    family = cpu.get("cpu family", "0")
    return cpu.get("vendor_id") == "AuthenticAMD" and int(family) >= _AMD_ZEN5 and "avx512f" in cpu.get("flags", "")


def _cpu_lines() -> dict[str, str]:
    """Return what Linux says of the first CPU; nothing where it says nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _onednn_works() -> bool:
    """Try the operation, which is private to torch and may change, on a small product."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = torch.linspace(-1, 1, 96).view(12, 8), torch.linspace(-1, 1, 40).view(5, 8)
    bias = torch.linspace(-1, 1, 5)
    try:
        return torch.allclose(_multiply(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)
    except (RuntimeError, TypeError):
        return False


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·weightᵀ + bias by oneDNN: (…, K) and (O, K) → (…, O). `x` is copied unless contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """x·weightᵀ + bias and its gradients, each one oneDNN product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs  # (…, O)
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows_x, rows_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (M, K), (M, O)
        if torch.is_grad_enabled():  # gradients of gradients are asked for: by operations that have them
            grad_x = grad @ weight if wants_x else None
            grad_weight = rows_grad.t() @ rows_x if wants_weight else None
        else:
            grad_x = _multiply(grad, weight.t()) if wants_x else None
            grad_weight = _weight_gradient(rows_x, rows_grad) if wants_weight else None
        return grad_x, grad_weight, rows_grad.sum(0) if wants_bias else None


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return gradᵀ·x: (M, K) and (M, O) → (O, K). The first operand is copied: the smaller one is."""
    if grad.shape[1] > x.shape[1]:
        return _multiply(x.t(), grad.t()).t()
    return _multiply(grad.t(), x.t())
