"""Drop path that leaves dropped samples out is the drop path that zeroes them: values, gradients, averages, resume."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvit.model.backbone import set_drop_path_mode
from mvit.model.block import DropPath
from mvit.variants import Variant, create_backbone, create_model

SMALL = Variant("small_test", 24, (1, 1, 2, 1), 1)


def small_model(rate: float | tuple[float, ...] = 0.5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(SMALL, 5, options.pop("input_size", (32, 32)), drop_path=rate, **options)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def outcome(model: nn.Module, mode: str, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    set_drop_path_mode(model, mode)
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    maps = list(out.values()) if isinstance(out, dict) else [out]
    products = [(m * torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view(m.shape)).sum() for m in maps]
    torch.stack(products).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {"random state": torch.get_rng_state()}
    return {f"out{i}": m.detach() for i, m in enumerate(maps)} | grads | state


def assert_equal_but_for_rounding(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.uint8:
            assert torch.equal(got[name], value), name
        else:
            assert (got[name] - value).abs().max() <= 1e-12 * max(value.abs().max().item(), 1.0), name


@pytest.mark.parametrize("rate", [0.3, (0.0, 0.5, 0.9, 0.999)])
@pytest.mark.parametrize("expand", ["attention", "mlp"])
@pytest.mark.parametrize("size", [(32, 32), (4, 32, 32)])
def test_skipping_is_masking_in_double_precision(rate: Any, expand: str, size: tuple[int, ...]) -> None:
    """The same samples are dropped for the same seed; also all of them, or none."""
    model = small_model(rate, expand=expand, input_size=size).double()
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    for seed in range(3):
        assert_equal_but_for_rounding(outcome(model, "skip", x, seed), outcome(model, "mask", x, seed))


def test_so_it_is_in_a_detectors_backbone() -> None:
    backbone = create_backbone(SMALL, window_size=8, drop_path=0.5).train().double()
    x = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    assert_equal_but_for_rounding(outcome(backbone, "skip", x), outcome(backbone, "mask", x))


def test_dropped_samples_are_not_computed_but_no_branch_is_left_out() -> None:
    model = small_model((0.0, 0.5, 0.5, 0.999), drop_path_mode="skip")
    batches: list[list[int]] = [[] for _ in range(5)]
    for i, block in enumerate(model.blocks):  # pyright: ignore[reportArgumentType]
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda _, inputs, __, i=i: batches[i].append(len(inputs[0])))
    for seed in range(20):
        outcome(model, "skip", torch.randn(4, 3, 32, 32), seed)
        assert all(p.grad is not None for p in model.parameters())
    assert batches[0] == [4] * 40
    assert batches[4] == [1] * 40
    for counts in batches[1:4]:
        assert set(counts) >= {1, 2, 3}
        assert sum(counts) / len(counts) == pytest.approx(2.0, abs=0.6)


def test_the_mean_over_masks_is_the_branch_itself() -> None:
    drop = DropPath(0.75).train()
    drop.mode = "skip"
    torch.manual_seed(0)
    skip, total = torch.ones(8, 2, 3), torch.zeros(8, 2, 3)
    branch = torch.arange(8.0).view(8, 1, 1).expand(8, 2, 3)
    for _ in range(2000):
        kept = drop.draw(skip)
        assert kept is not None
        total += kept.add(skip, kept.select(branch))
    assert torch.allclose(total / 2000, skip + branch, rtol=0.15)


def test_activation_checkpointing_drops_the_same_samples_again() -> None:
    model = small_model(0.5, head_dropout=0.2)
    x = torch.randn(4, 3, 32, 32)
    plain = outcome(model, "skip", x)
    model.set_activation_checkpointing(["stage1", "stage3", "stage4"])  # pyright: ignore[reportCallIssue]
    again = outcome(model, "skip", x)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_compiled_model_masks() -> None:
    model = small_model(0.5)
    x = torch.randn(4, 3, 32, 32)
    expected = outcome(model, "mask", x)["out0"]
    set_drop_path_mode(model, "skip")
    torch.manual_seed(3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert torch.allclose(compiled, expected, atol=1e-5)


def test_autocast_and_evaluation_are_as_ever() -> None:
    model = small_model(0.5)
    x = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = outcome(model, "skip", x), outcome(model, "mask", x)
    assert got["out0"].dtype == expected["out0"].dtype
    assert torch.allclose(got["out0"].float(), expected["out0"].float(), atol=0.05)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown drop path mode 'subset'; choose from \['auto', 'mask', 'skip'\]"):
        small_model(drop_path_mode="subset")
