"""The linear layer by oneDNN is the linear layer: values, gradients, compilers; and which CPUs take it."""

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvit.model import linear
from mvit.model.linear import ONEDNN_ENV, Linear, onednn_is_chosen
from mvit.variants import Variant, create_model


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(ONEDNN_ENV, "1")
    onednn_is_chosen.cache_clear()
    if not onednn_is_chosen():
        pytest.skip("this torch has no oneDNN linear")
    yield
    onednn_is_chosen.cache_clear()


def outcome(layer: Linear, x: Tensor) -> tuple[list[Tensor], str]:
    """Return output and gradients, and who computed them."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)], str(out.grad_fn)


@pytest.mark.parametrize("shape", [(2, 9, 24), (7, 24), (24,), (1, 3, 5, 24)])
@pytest.mark.parametrize("outputs", [16, 48])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_plain_ones(
    shape: tuple[int, ...], outputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, outputs, bias=bias), torch.randn(shape)
    got, by = outcome(layer, x)
    assert "OneDnn" in by
    monkeypatch.setenv(ONEDNN_ENV, "0")
    onednn_is_chosen.cache_clear()
    expected, by = outcome(layer, x)
    assert "OneDnn" not in by
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients_are_taken() -> None:
    layer = Linear(6, 10)
    x = torch.randn(4, 6, 5).transpose(1, 2).requires_grad_()
    out = layer(x)
    (grad,) = torch.autograd.grad(out.transpose(0, 2).contiguous().square().sum(), x)
    assert torch.allclose(grad, 2 * F.linear(x, layer.weight, layer.bias) @ layer.weight, atol=1e-5)


def test_a_whole_model_keeps_its_names_and_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = create_model(Variant("small_test", 24, (1, 1, 1, 1), 1), 5, (64, 64))
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    monkeypatch.setenv(ONEDNN_ENV, "0")
    onednn_is_chosen.cache_clear()
    assert torch.allclose(model(images), logits, atol=1e-5)
    assert {"head.projection.weight", "head.projection.bias"} <= model.state_dict().keys()


def test_other_precisions_and_tracers_get_the_plain_linear() -> None:
    layer = Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert "OneDnn" not in str(copy.deepcopy(layer).double()(x.double()).grad_fn)
    assert layer(x[:0]).shape == (0, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    exported = torch.export.export(layer, (x,))
    assert "aten.linear.default" in {str(node.target) for node in exported.graph.nodes}


def test_gradients_of_gradients_and_transforms_work() -> None:
    layer = Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    reference = F.linear(x, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(reference.pow(3).sum(), x, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(second, expected_second, atol=1e-5)
    per_row = torch.func.vmap(torch.func.grad(lambda row: layer(row).pow(3).sum()))(x.detach())
    assert torch.allclose(per_row, grad, atol=1e-5)


@pytest.mark.parametrize(
    ("cpu", "chosen"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "fma avx512f"}, True),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "fma avx512f"}, False),
        ({"vendor_id": "GenuineIntel", "cpu family": "27", "flags": "fma avx512f"}, False),
        ({}, False),
    ],
)
def test_only_cpus_on_which_it_was_measured_take_it(
    cpu: dict[str, str], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ONEDNN_ENV)
    monkeypatch.setattr(linear, "_cpu_lines", lambda: cpu)
    onednn_is_chosen.cache_clear()
    assert onednn_is_chosen() is chosen


def test_a_torch_without_the_operation_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(*_: object) -> Tensor:
        raise TypeError("unknown argument")

    monkeypatch.setattr(linear, "_multiply", changed)
    onednn_is_chosen.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert Linear(4, 4)(torch.ones(1, 4)).shape == (1, 4)
    assert "no usable oneDNN linear" in caplog.text


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONEDNN_ENV, "yes")
    onednn_is_chosen.cache_clear()
    with pytest.raises(ValueError, match=r"MVIT_ONEDNN_LINEAR='yes' must be 1 \(oneDNN\), 0"):
        Linear(4, 4)(torch.ones(1, 4))
