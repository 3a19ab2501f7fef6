"""The whole model: any input size, checkpointing, drop path, precision, read-outs, layers for lr decay."""

import pytest
import torch
from torch import Tensor

from mvit.model.attention import PoolingAttention
from mvit.model.backbone import MViT
from mvit.model.block import DropPath, pool_skip
from mvit.model.convert import layer_index
from mvit.variants import Variant, create_model

SMALL = Variant("small_test", 24, (1, 1, 2, 1), 1)
ALL_STAGES = ("stage1", "stage2", "stage3", "stage4")


def small_model(**options: object) -> MViT:
    torch.manual_seed(0)
    return create_model(SMALL, num_classes=5, **({"input_size": (64, 64)} | options))  # pyright: ignore[reportArgumentType]


def loss_and_grads(model: MViT, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)  # the same drop-path masks
    loss = model(images).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (37, 61), (224, 4), (5, 7)])
@pytest.mark.parametrize("class_token", [False, True])
def test_any_height_and_width_run(size: tuple[int, int], class_token: bool) -> None:
    model = small_model(class_token=class_token, absolute_positions=True)
    images = torch.randn(2, 3, *size)
    logits = model(images)
    logits.sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # and a model built for that size
    assert small_model(class_token=class_token, input_size=size)(images).shape == (2, 5)


@pytest.mark.parametrize("size", [(8, 32, 32), (3, 20, 45), (1, 32, 32)])
@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"absolute_positions": "separable"}])
def test_any_clip_length_and_size_run(size: tuple[int, ...], options: dict[str, object]) -> None:
    model = small_model(input_size=(8, 32, 32), **options)
    logits = model(torch.randn(2, 3, *size))
    logits.sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None for p in model.parameters())


def test_relative_positions_of_one_kind_have_only_their_tables() -> None:
    def tables(kind: object) -> set[str]:
        model = small_model(input_size=(4, 32, 32), relative_positions=kind)
        model(torch.randn(1, 3, 4, 32, 32))
        return {name.rsplit("_", 1)[1] for name, _ in model.named_parameters() if "rel_pos" in name}

    assert tables(True) == {"t", "h", "w"}
    assert tables("spatial") == {"h", "w"}
    assert tables("temporal") == {"t"}
    assert tables(False) == set()


@pytest.mark.parametrize("stages", [ALL_STAGES, ("stage1", "stage3"), ()])
@pytest.mark.parametrize("size", [(64, 64), (8, 32, 32)])
def test_checkpointing_changes_no_bit_of_loss_or_gradients(stages: tuple[str, ...], size: tuple[int, ...]) -> None:
    model = small_model(drop_path=0.5, head_dropout=0.2, class_token=True, input_size=size).train()
    images = torch.randn(4, 3, *size)
    loss, grads = loss_and_grads(model, images)
    model.set_activation_checkpointing(stages)
    loss_again, grads_again = loss_and_grads(model, images)
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_checkpointing_computes_the_named_stages_twice_and_only_when_training() -> None:
    model = small_model().train()
    calls: list[int] = []
    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.set_activation_checkpointing(["stage3"])
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert [calls.count(i) for i in range(5)] == [1, 1, 2, 2, 1]
    calls.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert calls == [0, 1, 2, 3, 4]


def test_unknown_stage_is_refused_with_the_stages_named() -> None:
    with pytest.raises(ValueError, match=r"unknown stage 'stage5'.*'stage1', 'stage2', 'stage3', 'stage4'"):
        small_model().set_activation_checkpointing(["stage5"])


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out.amax(dim=(1, 2)), out.amin(dim=(1, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(torch.ones(3, 1, 1)), torch.ones(3, 1, 1))


def test_drop_path_always_leaves_a_gradient_for_every_parameter() -> None:
    """Also when every sample is dropped: a parameter without gradient would break ZeRO-3 and DDP."""
    model = small_model(drop_path=(0.999, 0.999, 0.999, 0.999)).train()
    _, grads = loss_and_grads(model, torch.randn(2, 3, 64, 64))
    assert grads.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (3, 7, 5)])
def test_the_skip_is_the_published_max_pool(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, 1 + torch.Size(grid).numel(), 8)
    new_grid = (*grid[:-2], -(-grid[-2] // 2), -(-grid[-1] // 2))
    maps = x[:, 1:].transpose(1, 2).unflatten(2, (*[1] * (3 - len(grid)), *grid))
    pooled = torch.nn.functional.max_pool3d(maps, (1, 3, 3), (1, 2, 2), (0, 1, 1)).flatten(2).transpose(1, 2)
    assert torch.equal(pool_skip(x, grid, new_grid), torch.cat((x[:, :1], pooled), dim=1))


def test_channels_grow_where_asked() -> None:
    attention, mlp = small_model(expand="attention"), small_model(expand="mlp")
    assert [i for i, block in enumerate(attention.blocks) if block.proj is not None] == [1, 2, 4]
    assert [i for i, block in enumerate(mlp.blocks) if block.proj is not None] == [0, 1, 3]


def test_readouts_use_the_tokens_they_name() -> None:
    images = torch.randn(2, 3, 64, 64)
    outputs = {kind: small_model(class_token=True, readout=kind).eval()(images) for kind in ("class_token", "mean")}
    assert not torch.allclose(outputs["class_token"], outputs["mean"], atol=1e-3)
    model = small_model(class_token=True, readout="mean").eval()
    tokens, _ = model.encode(images)
    assert torch.allclose(model.head.projection(model.norm(tokens)[:, 1:].mean(dim=1)), outputs["mean"], atol=1e-6)


def test_a_clip_for_an_image_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\), got a tensor of shape \(1, 3, 8, 64, 64\)"):
        small_model()(torch.randn(1, 3, 8, 64, 64))
    with pytest.raises(ValueError, match=r"takes clips"):
        small_model(input_size=(8, 64, 64))(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(48, 64), (6, 32, 48)])
def test_the_whole_model_runs_in_one_precision(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    model = small_model(class_token=True, absolute_positions=True, input_size=(32,) * len(size)).eval()
    images = torch.randn(2, 3, *size)
    expected = model(images)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("size", [(64, 64), (4, 32, 32)])
def test_autocast_trains_with_float32_gradients(size: tuple[int, ...]) -> None:
    model = small_model(drop_path=0.1, input_size=size).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, *size)).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("size", [(48, 64), (6, 32, 48)])
def test_the_model_is_one_graph_for_torch_compile(size: tuple[int, ...]) -> None:
    model = small_model(class_token=True, input_size=(32,) * len(size)).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images), model(images), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["matmul", "fused"])
@pytest.mark.parametrize("size", [(48, 64), (6, 32, 48)])
def test_the_traced_training_step_gives_the_same_loss_and_gradients(form: str, size: tuple[int, ...]) -> None:
    model = small_model(class_token=True, drop_path=0.3, input_size=(32,) * len(size)).train()
    model.set_attention_form(form)
    images = torch.randn(2, 3, *size)
    loss, grads = loss_and_grads(model, images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    torch.manual_seed(7)
    compiled_loss = compiled(images).square().sum()
    compiled_loss.backward()
    assert torch.allclose(compiled_loss, loss, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if not name.endswith("norm_k.bias"):
            assert torch.allclose(parameter.grad, grads[name], rtol=1e-4, atol=1e-4 * grads[name].abs().max().item())


@pytest.mark.slow
def test_compiled_attention_gives_the_same_output_and_gradients() -> None:
    attention = PoolingAttention(24, 24, 2, (1, 1), (2, 2), [(13, 7)] * 2, class_token=True)
    x = torch.randn(2, 1 + 13 * 7, 24, requires_grad=True)
    out, _ = attention(x, (13, 7))
    (expected,) = torch.autograd.grad(out.square().sum(), x)
    compiled_out, _ = torch.compile(attention, fullgraph=True)(x, (13, 7))
    (grad,) = torch.autograd.grad(compiled_out.square().sum(), x)
    assert torch.allclose(compiled_out, out, atol=1e-5)
    assert torch.allclose(grad, expected, atol=1e-4)


def test_layers_for_learning_rate_decay_go_from_the_patches_to_the_head() -> None:
    model = small_model(class_token=True, absolute_positions=True)
    layers = {name: layer_index(name, 5) for name, _ in model.named_parameters()}
    assert {layers[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert {layer for name, layer in layers.items() if name.startswith("blocks.3.")} == {4}
    assert {layers["norm.weight"], layers["head.projection.bias"]} == {6}
    assert set(layers.values()) == set(range(7))
    with pytest.raises(ValueError, match=r"'decoder\.lateral' belongs to no layer"):
        layer_index("decoder.lateral", 5)
    with pytest.raises(ValueError, match=r"blocks\.5"):
        layer_index("blocks.5.norm1.weight", 5)
