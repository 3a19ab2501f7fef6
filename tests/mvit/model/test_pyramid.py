"""The backbone gives detectron2's maps for detectron2's weights, for images of any size, in every kind of attention."""

import pytest
import torch
from golden_replay import DETECTION_CASES, MAPS_TOLERANCE, load_golden
from torch import Tensor

import mvit
from mvit.model.attention import ATTENTION_FORMS
from mvit.model.convert import layer_index
from mvit.model.pyramid import StagePyramid
from mvit.model.window import ATTENTION_SCOPES
from mvit.variants import Variant, create_backbone, create_model

SMALL = Variant("small_test", 24, (1, 2, 3, 2), 1)
SMALL_CASES = [case for case in DETECTION_CASES if "small" in case]
# The published classifiers (test_variants.py) less head and final norm, plus four norms; tiny as recorded
PARAMETERS = [
    ("mvitv2_tiny", "attention", 23_405_664),
    ("mvitv2_small", "attention", 34_870_216 - 769_000 - 2 * 768 + 2 * 1440),
    ("mvitv2_base", "attention", 51_472_744 - 769_000 - 2 * 768 + 2 * 1440),
    ("mvitv2_large", "attention", 213_635_368 - 1_153_000 - 2 * 1152 + 2 * 2160),
    ("mvitv2_large", "mlp", 217_992_952 - 1_153_000 - 2 * 1152 + 2 * 3168),
    ("mvitv2_huge", "attention", 666_879_720 - 1_537_000 - 2 * 1536 + 2 * 2880),
]


def small(seed: int = 0, **options: object) -> StagePyramid:
    torch.manual_seed(seed)
    return create_backbone(SMALL, **({"input_size": (64, 64), "window_size": 16} | options))


def check_case(case: str, form: str) -> None:
    golden = load_golden(case)
    backbone = golden.backbone()
    backbone.set_attention_form(form)
    maps = backbone(golden.input())
    loss = torch.zeros(())
    for scale, found in maps.items():
        assert list(found.shape) == golden.facts["outputs"][scale]["shape"]
        step = golden.map_step(scale)
        assert (found[:, :, ::step, ::step] - golden.tensors[f"{scale}_sub"]).abs().max() <= MAPS_TOLERANCE
        assert (found.mean((2, 3)) - golden.tensors[f"{scale}_chan_mean"]).abs().max() <= MAPS_TOLERANCE
        loss = loss + (found * golden.map_cotangent(scale)).sum()
    loss.backward()
    assert golden.mismatched({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}) == []


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("case", SMALL_CASES)
def test_maps_and_gradient_norms_are_detectron2s(case: str, form: str) -> None:
    check_case(case, form)


def test_maps_and_gradient_norms_of_tiny_are_detectron2s() -> None:
    check_case("det_T_256x320", "auto")


@pytest.mark.parametrize("case", DETECTION_CASES)
def test_tokens_after_each_stage_are_detectron2s(case: str) -> None:
    golden = load_golden(case)
    backbone = golden.backbone()
    means: list[Tensor] = []
    for blocks in backbone.stages.values():
        backbone.blocks[blocks.stop - 1].register_forward_hook(lambda _m, _a, out: means.append(out[0].mean(dim=1)))
    with torch.no_grad():
        backbone(golden.input())
    for number, mean in enumerate(means, start=1):
        assert torch.allclose(mean, golden.tensors[f"stage{number}_token_mean"], atol=2e-5)


@pytest.mark.parametrize("case", DETECTION_CASES)
def test_windows_and_strides_of_every_block_are_detectron2s(case: str) -> None:
    golden = load_golden(case)
    backbone = golden.backbone()
    for block, row in zip(backbone.blocks, golden.facts["block_table"], strict=True):
        attention = block.attn
        assert list(attention.pool_q.stride) == row["stride_q"]
        assert list(attention.pool_k.stride) == list(attention.pool_v.stride) == row["stride_kv"]
        window = attention.cuts[0].size * attention.pool_q.stride[0] if attention.cuts else 0
        assert window == row["window"]
        assert attention.num_heads == row["heads"]


@pytest.mark.parametrize("case", DETECTION_CASES)
def test_the_parameters_are_detectron2s_but_for_the_positions_of_a_token_that_is_not_there(case: str) -> None:
    golden = load_golden(case)
    count = sum(p.numel() for p in golden.backbone().parameters())
    unused = 24 if case == "det_small_abs" else 0
    assert count == golden.facts["param_count"] - unused


@pytest.mark.parametrize(("name", "expand", "count"), PARAMETERS)
def test_backbones_have_the_published_number_of_parameters(name: str, expand: str, count: int) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name, expand=expand)  # pyright: ignore[reportArgumentType]
    assert sum(p.numel() for p in backbone.parameters()) == count


@pytest.mark.parametrize("attention", ATTENTION_SCOPES)
@pytest.mark.parametrize("size", [(250, 333), (64, 64), (31, 5), (97, 130)])
def test_images_of_any_size_run_in_every_kind_of_attention(attention: str, size: tuple[int, int]) -> None:
    backbone = small(attention=attention).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = backbone(images)
        alone = backbone(images[1:])
    assert backbone.out_channels == {"scale2": 24, "scale3": 48, "scale4": 96, "scale5": 192}
    assert list(maps) == list(backbone.out_channels)
    for number, (scale, found) in enumerate(maps.items()):
        stride = 4 * 2**number
        assert found.shape == (2, backbone.out_channels[scale], -(-size[0] // stride), -(-size[1] // stride))
        assert found.isfinite().all()
        assert torch.allclose(found[1:], alone[scale], atol=1e-5)  # no image sees another's windows


@pytest.mark.parametrize("attention", ["hwin", "window", "swin"])
def test_windows_that_cover_the_map_are_full_attention(attention: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    full = small(hybrid_window=False).eval()
    assert full.attention == "full"
    other = small(1, attention=attention).eval()
    other.load_state_dict(full.state_dict())
    with torch.no_grad():
        expected, found = full(images), other(images)
        assert all(torch.allclose(found[scale], expected[scale], atol=1e-5) for scale in expected)
        larger = torch.randn(1, 3, 128, 96)
        expected, found = full(larger), other(larger)
        assert not any(torch.allclose(found[scale], expected[scale], atol=1e-2) for scale in expected)


@pytest.mark.parametrize("expand", ["attention", "mlp"])
def test_full_attention_is_the_classifiers_but_for_two_strides(expand: str) -> None:
    """One attention for both: with the classifier's strides the last map is its tokens, bit for bit."""
    torch.manual_seed(0)
    classifier = create_model(SMALL, 5, (64, 64), expand=expand).eval()  # pyright: ignore[reportArgumentType]
    backbone = small(1, attention="full", expand=expand, weights=classifier.state_dict()).eval()
    changed = 0
    for ours, theirs in zip(backbone.blocks, classifier.blocks, strict=True):
        for pool in ("pool_k", "pool_v"):
            changed += getattr(ours.attn, pool).stride != getattr(theirs.attn, pool).stride
            getattr(ours.attn, pool).stride = getattr(theirs.attn, pool).stride
    assert changed == 4
    images = torch.randn(2, 3, 72, 100)
    with torch.no_grad():
        tokens, grid = classifier.encode(images)
        expected = backbone.scale5_norm(tokens).unflatten(1, grid).permute(0, 3, 1, 2)
        assert torch.equal(backbone(images)["scale5"], expected)


def reached(backbone: StagePyramid, scale: str) -> tuple[bool, bool]:
    """Tell whether a change in one corner reaches the middle of a map, just behind the window's edge, and its end."""
    torch.manual_seed(3)
    images = torch.randn(1, 3, 128, 128)
    other = images.clone()
    other[:, :, 2:6, 2:6] += 10
    with torch.no_grad():
        change = (backbone(images)[scale] - backbone(other)[scale]).abs().amax(dim=(0, 1)) > 0
    side = change.shape[0]
    assert change[side // 2 - 1, side // 2 - 1]
    return bool(change[side // 2, side // 2]), bool(change[-1, -1])


def test_a_block_with_windows_sees_its_window_and_a_global_block_the_picture() -> None:
    """A window is a quarter of this picture; stage 1 has one block, the last one of stage 2 is global in Hwin."""
    backbones = {scope: small(attention=scope).eval() for scope in ATTENTION_SCOPES}
    assert reached(backbones["full"], "scale2") == (True, True)
    for scope in ("hwin", "window", "swin"):
        assert reached(backbones[scope], "scale2") == (False, False)
    assert reached(backbones["hwin"], "scale3") == (True, True)


@pytest.mark.parametrize("attention", ATTENTION_SCOPES)
def test_activation_checkpointing_changes_nothing(attention: str) -> None:
    backbone = small(attention=attention, drop_path=0.3).train()
    images = torch.randn(2, 3, 72, 100)
    grads: list[dict[str, Tensor]] = []
    calls: list[int] = []
    backbone.blocks[3].norm1.register_forward_hook(lambda *_: calls.append(3))
    for stages in ((), ("stage1", "stage3")):
        backbone.set_activation_checkpointing(stages)
        backbone.zero_grad()
        torch.manual_seed(5)
        sum(found.square().sum() for found in backbone(images).values()).backward()
        grads.append({name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None})
    assert len(calls) == 3
    assert grads[0].keys() == grads[1].keys() == {name for name, _ in backbone.named_parameters()}
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    with pytest.raises(ValueError, match="unknown stage 'scale2'"):
        backbone.set_activation_checkpointing(["scale2"])


def test_the_backbone_is_one_graph_for_torch_compile() -> None:
    """With shifted windows, which have most to trace; global blocks are the classifiers', tested there."""
    backbone = create_backbone(Variant("shallow_test", 24, (1, 1, 2, 1), 1), attention="swin", window_size=16).eval()
    images = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        compiled = torch.compile(backbone, fullgraph=True, backend="eager")
        expected, found = backbone(images), compiled(images)
    assert all(torch.allclose(found[scale], expected[scale], atol=1e-5) for scale in expected)


@pytest.mark.parametrize("attention", ["hwin", "swin"])
def test_bfloat16_gives_nearly_the_same_maps(attention: str) -> None:
    backbone = small(attention=attention).eval()
    images = torch.randn(1, 3, 72, 100)
    expected = backbone(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(images)
    pure = backbone.bfloat16()(images.bfloat16())
    assert {found.dtype for found in pure.values()} == {torch.bfloat16}
    for scale, value in expected.items():
        for found in (mixed[scale], pure[scale]):
            assert (found.float() - value).norm() / value.norm() < 0.05


def test_maps_of_channels_grown_in_the_mlp_are_announced() -> None:
    backbone = small(expand="mlp").eval()
    assert backbone.out_channels == {"scale2": 48, "scale3": 96, "scale4": 192, "scale5": 192}
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert {scale: found.shape[1] for scale, found in maps.items()} == backbone.out_channels


def test_the_stride_of_keys_is_an_option() -> None:
    """The paper's "pooling (stride=8)" (Table 4)."""
    backbone = small(hybrid_window=False, kv_stride=8)
    assert [block.attn.pool_k.stride[0] for block in backbone.blocks] == [8, 4, 8, 2, 2, 4, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "global"}, r"attention='global' must be one of None, 'hwin', 'window', 'swin', 'full'"),
        ({"attention": "hwin", "hybrid_window": False}, r'hybrid_window=False contradicts attention="hwin"'),
        ({"hybrid_window": "swin"}, r"hybrid_window='swin' must be one of True, False"),
        ({"expand": "head"}, r"expand='head' must be one of 'attention', 'mlp'"),
        ({"window_size": 20}, r"window_size=20 must be a positive multiple of 8"),
        ({"kv_stride": 0}, r"kv_stride=0 must be at least 1"),
        ({"input_size": (8, 64, 64)}, r"input_size=\(8, 64, 64\) must be \(H, W\)"),
        ({"relative_positions": "spatial"}, r"relative_positions='spatial' must be one of True, False"),
        ({"absolute_positions": "separable"}, r"absolute_positions='separable' must be one of True, False"),
        ({"drop_path": 1.0}, r"drop_path=1.0 must be in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\), got a tensor of shape \(1, 3, 8, 64, 64\)"):
        small()(torch.randn(1, 3, 8, 64, 64))
    with pytest.raises(ValueError, match=r"unknown variant 'mvitv2_tinny'\. Did you mean 'mvitv2_tiny'"):
        mvit.create_backbone("mvitv2_tinny")


def test_layers_for_learning_rate_decay_end_with_the_norms_of_the_maps() -> None:
    layers = {name: layer_index(name, 8) for name, _ in small(absolute_positions=True).named_parameters()}
    assert {layer for name, layer in layers.items() if name.startswith("scale")} == {9}
    assert layers["pos_embed"] == 0
    assert set(layers.values()) == set(range(10))
