"""The forms of attention are one function; its positions are the official ones at every grid."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvit.model.attention import ATTENTION_FORMS, DepthwisePool, PoolingAttention
from mvit.model.positions import relative_index, resize_absolute, resize_table

# (grid the tables are made for, grid of the input), class token, relative axes; odd, non-square, larger and smaller
GRIDS = [((8, 8), (8, 8)), ((8, 8), (13, 5)), ((7, 9), (7, 9)), ((2, 8, 8), (3, 13, 6)), ((4, 6, 6), (1, 5, 5))]
STRIDES = [(1, 4), (2, 2), (2, 1), (1, 1)]


def run(attention: PoolingAttention, form: str, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
    attention.form = form
    attention.zero_grad()
    x = x.clone().requires_grad_()
    out, _ = attention(x, grid)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("trained", "grid"), GRIDS)
def test_forms_agree_in_double_precision(
    trained: tuple[int, ...], grid: tuple[int, ...], class_token: bool, relative: bool
) -> None:
    torch.manual_seed(0)
    for stride_q, stride_kv in STRIDES:
        frames = (1,) * (len(grid) - 2)
        attention = PoolingAttention(
            12,
            24,
            2,
            (*frames, stride_q, stride_q),
            (*frames, stride_kv, stride_kv),
            [(size, size) if relative else None for size in trained],
            class_token=class_token,
        ).double()
        for name, table in attention.named_parameters():
            if name.startswith("rel_pos"):
                torch.nn.init.normal_(table, std=0.5)
        x = torch.randn(2, int(class_token) + torch.Size(grid).numel(), 12, dtype=torch.float64)
        expected = run(attention, "reference", x, grid)
        for form in ("matmul", "fused"):
            got = run(attention, form, x, grid)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                scale = max(value.abs().max().item(), 1.0)
                assert (got[name] - value).abs().max().item() <= 1e-12 * scale, (form, name, stride_q, stride_kv)


class CountMatrices(TorchDispatchMode):
    """Count the operations whose result is newly stored and has at least `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.storages: set[int] = set()
        self.results: list[Tensor] = []  # kept alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.numel * tensor.element_size():
                self.results.append(tensor)
                self.storages.add(tensor.untyped_storage().data_ptr())
        return out


def test_the_folded_forms_store_no_bias_matrix() -> None:
    """Of Lq × Lk numbers, "matmul" stores the logits and the probabilities, "fused" nothing."""
    attention = PoolingAttention(16, 16, 1, (1, 1), (1, 1), [(24, 24)] * 2)
    tokens = 24 * 24
    stored: dict[str, int] = {}
    for form in ("reference", "matmul", "fused"):
        attention.form = form
        with CountMatrices(tokens * tokens) as count, torch.no_grad():
            attention(torch.randn(1, tokens, 16), (24, 24))
        stored[form] = len(count.storages)
    assert stored["reference"] > 2
    assert stored["matmul"] == 2
    assert stored["fused"] == 0


def official_index(q_size: int, k_size: int) -> Tensor:
    """SlowFast's order of single-precision operations, evaluated one at a time."""
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    distance = torch.arange(q_size)[:, None] * q_step - torch.arange(k_size)[None, :] * k_step
    return (distance + (k_size - 1) * k_step).long()


def test_relative_index_rounds_as_the_official_code() -> None:
    for q_size, k_size in itertools.product(range(1, 130), repeat=2):
        index = relative_index(q_size, k_size, torch.device("cpu"))
        assert torch.equal(index, official_index(q_size, k_size)), (q_size, k_size)
        assert index.min() >= 0
        assert index.max() <= 2 * max(q_size, k_size) - 2
    # Why the order matters: exact arithmetic gives other rows for video at 312 px
    exact = (torch.arange(78)[:, None] * 20 - torch.arange(20)[None, :] * 78 + 19 * 78) // 20
    assert not torch.equal(relative_index(78, 20, torch.device("cpu")), exact)


def test_resizing_keeps_what_has_the_right_size_and_interpolates_linearly() -> None:
    table = torch.arange(4.0)[:, None].expand(4, 3)
    assert resize_table(table, 4) is table
    assert resize_table(table, 8)[:, 0].tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    positions = torch.randn(1, 1 + 16, 6)
    resized = resize_absolute(positions, (4, 4), (6, 5), 1)
    assert resized.shape == (1, 1 + 30, 6)
    assert torch.equal(resized[:, 0], positions[:, 0])


@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (2, 24, 3, 9, 7)])
def test_all_heads_are_pooled_by_one_shared_kernel(shape: tuple[int, ...]) -> None:
    pool = DepthwisePool(8, (*[1] * (len(shape) - 4), 2, 2))
    maps = torch.randn(shape)
    conv = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv3d
    per_head = [conv(head, pool.weight, stride=pool.stride, padding=1, groups=8) for head in maps.split(8, dim=1)]
    assert torch.allclose(pool(maps), torch.cat(per_head, dim=1), atol=1e-6)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16_is_close_to_float32_in_every_form(form: str, pure: bool) -> None:
    torch.manual_seed(0)
    attention = PoolingAttention(32, 32, 2, (2, 2), (2, 2), [(8, 8)] * 2, class_token=True)
    x = torch.randn(2, 65, 32)
    expected = run(attention, "reference", x, (8, 8))
    if pure:
        got = run(attention.bfloat16(), form, x.bfloat16(), (8, 8))
        assert got["out"].dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(attention, form, x, (8, 8))
        assert got["pool_k.weight"].dtype == torch.float32
    for name in ("out", "x", "rel_pos_h", "pool_k.weight", "qkv.weight"):
        error = (got[name].float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, (name, error)
