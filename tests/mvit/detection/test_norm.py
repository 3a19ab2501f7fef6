"""Batch norm over regions counts each region of every rank once; layer norm is over channels."""

import torch
from torch import Tensor, nn

from mvit.detection.fpn import FeaturePyramid
from mvit.detection.norm import LayerNorm2d, RegionBatchNorm, head_norm
from tests.mvit.detection.tiny import TinyBackbone


def regions() -> Tensor:
    return torch.randn(10, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5


def test_alone_it_is_torchs_batch_norm() -> None:
    ours, theirs = RegionBatchNorm(4), nn.BatchNorm2d(4)
    for _ in range(2):
        x, y = regions().requires_grad_(), regions().requires_grad_()
        out, expected = ours(x), theirs(y)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        out.square()[:, :2].sum().backward()
        expected.square()[:, :2].sum().backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(regions()), theirs.eval()(regions()), atol=1e-4, rtol=1e-4)


def test_without_regions_nothing_moves() -> None:
    norm = RegionBatchNorm(4)
    x = torch.zeros(0, 4, 3, 3, requires_grad=True)
    norm(x).sum().backward()
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0] * 4
    assert norm.weight.grad is not None
    assert norm.weight.grad.tolist() == [0.0] * 4


def test_statistics_stay_fp32_in_a_bf16_model() -> None:
    norm = RegionBatchNorm(4).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_var is not None
    assert norm.running_var.dtype == torch.float32
    assert norm(regions().bfloat16()).dtype == torch.bfloat16
    assert norm.eval()(regions().bfloat16()).dtype == torch.bfloat16


def test_layer_norm_is_over_the_channels_of_each_position() -> None:
    x = regions()
    out = LayerNorm2d(4)(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(10, 3, 3), atol=1e-5, rtol=0)


def test_layer_norms_of_pyramid_and_heads_have_detectron2s_epsilon() -> None:
    norms = [each for each in FeaturePyramid(TinyBackbone(), 8, "layer").modules() if isinstance(each, LayerNorm2d)]
    assert len(norms) == 8
    assert {each.eps for each in [*norms, head_norm("layer", 8)] if each is not None} == {1e-6}
    x = regions() * 1e-3
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    torch.testing.assert_close(LayerNorm2d(4)(x), (x - mean) / (variance + 1e-6).sqrt())
