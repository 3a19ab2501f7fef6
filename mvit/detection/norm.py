"""The norms of the box and mask heads: over the channels of a position, or over all regions of all ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvit.detection.config import HeadNorm


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of maps (N, C, H, W), with detectron2's epsilon."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class RegionBatchNorm(nn.BatchNorm2d):
    """Batch norm over all regions of all ranks, each counted once, however many a rank has: none, even.

    The published cascade uses it (detectron2's synchronised norm with statistics weighted by number). In training
    every rank must call it equally often (collective). Computes in fp32 and keeps its statistics in it, on any device.
    """

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        # Distances from the running mean: the difference of squares below would cancel without
        x = input.float() - self.running_mean.view(1, -1, 1, 1)
        if self.training:
            shift, variance = self._batch_statistics(x)
            x = x - shift.view(1, -1, 1, 1)
        else:
            variance = self.running_var
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        return (x * scale.view(1, -1, 1, 1) + self.bias.float().view(1, -1, 1, 1)).to(input.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (C,) over all ranks of x (N, C, H, W), and move the running ones towards them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        count = x.new_full((1,), x.numel() / self.num_features)
        sums = torch.cat((x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count))
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = _SumOverRanks.apply(sums)
            assert isinstance(sums, Tensor)
        first, second, count = sums.split((self.num_features, self.num_features, 1))
        divisor = count.detach().clamp(min=1)
        shift = first / divisor
        variance = (second / divisor - shift.square()).clamp(min=0)
        with torch.no_grad():
            rate = self.momentum * count.clamp(max=1)  # no regions anywhere: the running statistics stay
            unbiased = variance * divisor / (divisor - 1).clamp(min=1)
            self.running_mean += rate * shift
            self.running_var += rate * (unbiased - self.running_var)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return shift, variance

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RegionBatchNorm":
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, statistic in before.items():  # in bf16 a step of the moving average would round to nothing
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, statistic.to(device=moved.device, dtype=torch.float32))
        return self


def head_norm(kind: HeadNorm, channels: int) -> nn.Module | None:
    """Return the norm of this kind, or None."""
    if kind == "none":
        return None
    return LayerNorm2d(channels) if kind == "layer" else RegionBatchNorm(channels)


def conv_block(in_channels: int, out_channels: int, norm: HeadNorm) -> nn.Sequential:
    """Return a 3 x 3 convolution, its norm (the bias goes if there is one) and a ReLU, He-initialised."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layer = head_norm(norm, out_channels)
    return nn.Sequential(conv, *([] if layer is None else [layer]), nn.ReLU())
