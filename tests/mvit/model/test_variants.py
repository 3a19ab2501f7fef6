"""The published table: exact parameter counts, published options, errors that say what to write instead."""

import pytest
import torch

from mvit.variants import VARIANTS, Variant, create_model, drop_path_rates

SMALL = Variant("small_test", 24, (1, 1, 2, 1), 1)

# Counted from the paper's formulas; reproduce timm's and torchvision's counts (huge: the paper's 667 M)
IMAGE_PARAMETERS = [
    ("mvitv2_tiny", None, 24_173_320),
    ("mvitv2_small", None, 34_870_216),
    ("mvitv2_base", None, 51_472_744),
    ("mvitv2_large", None, 217_992_952),  # as released for ImageNet-1K: channels grow in the MLP
    ("mvitv2_large", "attention", 213_635_368),  # as released for ImageNet-21K
    ("mvitv2_huge", None, 666_879_720),
]
IMAGENET21K_PARAMETERS = [
    ("mvitv2_tiny", 38.14),
    ("mvitv2_small", 48.84),
    ("mvitv2_base", 65.44),
    ("mvitv2_large", 234.58),
    ("mvitv2_huge", 694.80),
]
VIDEO_PARAMETERS = [
    ("mvitv2_small", (16, 224, 224), 400, 34_537_744),
    ("mvitv2_base", (32, 224, 224), 400, 51_230_128),
    ("mvitv2_large", (40, 312, 312), 400, 213_390_112),
    ("mvitv2_small", (16, 224, 224), 174, 34_363_950),
    ("mvitv2_base", (32, 224, 224), 174, 51_056_334),
    ("mvitv2_large", (40, 312, 312), 174, 213_129_534),
]


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "expand", "count"), IMAGE_PARAMETERS)
def test_image_models_have_the_published_number_of_parameters(name: str, expand: str | None, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name, expand=expand)  # pyright: ignore[reportArgumentType]
    assert num_parameters(model) == count


@pytest.mark.parametrize(("name", "millions"), IMAGENET21K_PARAMETERS)
def test_imagenet21k_models_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=19168, class_token=True, expand="attention")
    assert round(num_parameters(model) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "input_size", "num_classes", "count"), VIDEO_PARAMETERS)
def test_video_models_have_the_published_number_of_parameters(
    name: str, input_size: tuple[int, ...], num_classes: int, count: int
) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes, input_size)
    assert num_parameters(model) == count
    assert model.expand == "attention"
    assert model.cls_token is not None


def test_relative_tables_have_the_official_number_of_rows() -> None:
    """By floor, also where the convolutions give the ceiling: video at 312 px has grids 78, 39, 20, 10."""

    def rows(name: str, input_size: tuple[int, ...], axis: str) -> list[int]:
        with torch.device("meta"):
            model = create_model(name, input_size=input_size)
        return [getattr(block.attn, f"rel_pos_{axis}").shape[0] for block in model.blocks]

    assert rows("mvitv2_tiny", (224, 224), "h") == [111, 55, 55, 55, 27, 27, 27, 27, 27, 13]
    assert rows("mvitv2_tiny", (224, 320), "w") == [159, 79, 79, 79, 39, 39, 39, 39, 39, 19]
    assert sorted(set(rows("mvitv2_large", (40, 312, 312), "h"))) == [17, 37, 77, 155]
    assert set(rows("mvitv2_large", (40, 312, 312), "t")) == {39}


def test_published_drop_path_and_weight_decay_are_in_the_table() -> None:
    assert [v.drop_path for v in VARIANTS.values()] == [0.1, 0.1, 0.3, 0.5, 0.8]
    assert [v.weight_decay for v in VARIANTS.values()] == [0.05, 0.05, 0.05, 0.1, 0.1]
    assert [v.depth for v in VARIANTS.values()] == [10, 16, 24, 48, 80]


def test_one_drop_path_rate_grows_linearly_and_four_hold_per_stage() -> None:
    assert drop_path_rates(0.4, (1, 1, 2, 1)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rates((0.0, 0.1, 0.2, 0.3), (1, 1, 2, 1)) == [0.0, 0.1, 0.2, 0.2, 0.3]
    model = create_model(SMALL, drop_path=0.4)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_models_start_with_the_published_distributions() -> None:
    torch.manual_seed(0)
    model = create_model(Variant("w", 96, (1, 1, 1, 1), 1), class_token=True, absolute_positions=True)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("bias") and ("norm" in name or "patch_embed" not in name):
            assert (values == 0).all(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        elif ".pool_" in name:  # torch's default for a convolution over 9 values: uniform within 1/3
            assert values.abs().max() <= 1 / 3, name
            assert values.std().item() == pytest.approx((1 / 3) / 3**0.5, rel=0.1), name
        elif "patch_embed" not in name:  # linear weights, relative tables, class token, absolute positions
            assert values.std().item() == pytest.approx(0.02, rel=0.25), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "mvitv2_tinny"}, "unknown variant 'mvitv2_tinny'. Did you mean 'mvitv2_tiny'"),
        ({"variant": "resnet50"}, "mvitv2_tiny, mvitv2_small, mvitv2_base, mvitv2_large, mvitv2_huge"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"input_size": (224,)}, r"input_size=\(224,\) must be"),
        ({"input_size": (224, 3)}, "at least one patch"),
        ({"input_size": (1, 224, 224)}, "T ≥ 2"),
        ({"expand": "both"}, "expand='both' must be one of 'attention', 'mlp'"),
        ({"drop_path": 1.0}, r"drop_path=1.0 must be in \[0, 1\)"),
        ({"drop_path": (0.1, 0.2)}, "one rate or 4"),
        ({"readout": "class_token"}, "needs class_token=True"),
        ({"readout": "max"}, "readout='max' must be one of"),
        ({"relative_positions": "temporal"}, "are for clips"),
        ({"absolute_positions": "separable"}, "are for clips"),
        ({"absolute_positions": "sine"}, "absolute_positions='sine' must be one of"),
        ({"kv_stride": 0}, "kv_stride=0"),
        ({"head_dropout": 1.0}, "head_dropout=1.0"),
        ({"attention_form": "flash"}, "unknown attention form 'flash'; choose from"),
        ({"variant": Variant("x", 25, (1, 1, 1, 1), 2)}, "embed_dim=25 must be a positive multiple of num_heads=2"),
        ({"variant": Variant("x", 24, (1, 0, 1, 1), 2)}, r"depths=\(1, 0, 1, 1\)"),
        ({"variant": Variant("x", 24, (1, 1, 1, 1), 2, mlp_ratio=0.0)}, "mlp_ratio=0.0"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**({"variant": SMALL} | arguments))  # pyright: ignore[reportArgumentType]
