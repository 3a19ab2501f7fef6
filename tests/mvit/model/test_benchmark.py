"""The model benchmark measures every contender in every setting and counts FLOPs as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvit.benchmark import bench_model, count_macs
from mvit.benchmark_flops import forward_macs, matrix_rate, training_macs
from mvit.benchmark_peers import PEERS
from mvit.variants import create_model


# Multiply-adds, as timm and torchvision count them and the paper rounds them
@pytest.mark.parametrize(
    ("variant", "input_size", "published"),
    [
        ("mvitv2_tiny", (224, 224), 4.70),
        ("mvitv2_small", (224, 224), 7.00),
        ("mvitv2_large", (224, 224), 43.87),
        ("mvitv2_small", (16, 224, 224), 64.224),
        ("mvitv2_base", (32, 224, 224), 225),
        ("mvitv2_large", (40, 312, 312), 2828),
    ],
)
def test_flops_are_the_published_ones(variant: str, input_size: tuple[int, ...], published: float) -> None:
    assert count_macs(variant, input_size)["forward"] / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("variant", "size", "options"),
    [
        ("mvitv2_tiny", (224, 224), {}),
        ("mvitv2_large", (230, 200), {}),
        ("mvitv2_tiny", (16, 96, 96), {}),
        ("mvitv2_small", (64, 100), {"class_token": True, "relative_positions": False, "expand": "mlp"}),
    ],
)
def test_flops_are_those_that_torch_counts(variant: str, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """The forward pass exactly. Of the backward pass the products: torch counts a depthwise convolution's wrongly."""
    with torch.device("meta"):
        model = create_model(variant, 7, size, attention_form="reference", **options)
        inputs = torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as forward:
        logits = model(inputs)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward_macs(model, size) == forward.get_total_flops() / 2
    convolutions = forward.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2
    products = sum(flops for op, flops in backward.get_flop_counts()["Global"].items() if "convolution" not in str(op))
    assert products / 2 == 2 * (forward_macs(model, size) - convolutions)
    first = model.patch_embed(inputs)[0].shape[1] * model.patch_embed.proj.weight.numel()
    assert training_macs(model, size) == 3 * forward_macs(model, size) - first


def test_the_matrix_rate_is_one_of_this_machine() -> None:
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32, rounds=1) < 1e14


@pytest.mark.parametrize(("peer", "size"), [("timm", (32, 32)), ("torchvision", (4, 32, 32))])
def test_every_contender_is_measured_in_every_setting(
    peer: str, size: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Images beside timm, clips beside torchvision, without being asked."""
    pytest.importorskip(peer)
    rows = bench_model(["mvitv2_tiny"], [size], ["fp32"], 1, forms=("matmul", "fused"), rounds=2, device="cpu")
    table = capsys.readouterr().out
    assert all(word in table for word in ("x".join(map(str, size)), "CPU s min", "samples/s", "of medians", peer))
    json.dumps(rows)
    assert [(row["contender"], row["kind"]) for row in rows] == [
        (name, kind) for kind in ("forward", "train") for name in (peer, "mvit matmul", "mvit fused")
    ]
    for row in rows:
        assert row["input_size"] == size
        assert 0 < row["seconds_min"] <= row["seconds_median"]
        assert row["speedup"] == pytest.approx(1.0) or row["contender"] != peer
        theirs = next(other for other in rows if (other["contender"], other["kind"]) == (peer, row["kind"]))
        assert row["speedup_median"] == pytest.approx(theirs["seconds_median"] / row["seconds_median"])
        assert row["wall_samples_per_s"] > 0
        assert 0 < row["mfu"] < 1.5


def test_peers_without_such_a_model_are_left_out_beside_others(tmp_path: Path) -> None:
    """The issue's own command; a model of the user's, such as the official code's; recomputed or not."""
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\ndef build(variant, size):\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 4))\n"
    )
    against = ["torchvision", "reference", f"official={own}:build"]
    rows = bench_model(
        ["mvitv2_tiny"], [(32, 32)], ["fp32"], 1,
        against=against, rounds=1, device="cpu", show=False, checkpointing=(False, True), drop_path=0.3,
    )  # fmt: skip
    assert [(row["contender"], row["kind"], row["checkpointing"]) for row in rows] == [
        *((name, kind, False) for kind in ("forward", "train") for name in ("reference", "official", "mvit auto")),
        *((name, "train", True) for name in ("reference", "mvit auto")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine=nowhere.py:build", "must be NAME=FILE.py:FUNCTION"),
        ("mine=own.py", "must be NAME=FILE.py:FUNCTION"),
        ("mine=own.py:built", "own.py has no function 'built'"),
    ],
)
def test_a_model_of_the_users_that_is_not_there_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def build(variant, size): ...\n")
    with pytest.raises(ValueError, match=message):
        bench_model(["mvitv2_tiny"], [(32, 32)], against=[text])


@pytest.mark.parametrize(
    ("size", "against", "message"),
    [
        ((32, 32), "keras", "cannot bench 'keras'; choose from"),
        ((4, 32, 32), "timm", r"timm has no MViTv2 for clips \(4x32x32\); measure against torchvision"),
        ((32, 32), "torchvision", r"torchvision has no MViTv2 for images \(32x32\); measure against timm"),
    ],
)
def test_a_peer_without_such_a_model_is_refused(size: tuple[int, ...], against: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_model(["mvitv2_tiny"], [size], against=[against])


def test_torchvisions_small_is_the_one_it_publishes() -> None:
    video = pytest.importorskip("torchvision.models.video")
    with torch.device("meta"):
        theirs = PEERS["torchvision"].build("mvitv2_small", (16, 224, 224), 0.0)
        published = video.mvit_v2_s()
        ours = create_model("mvitv2_small", 400, (16, 224, 224))
    assert [(n, p.shape) for n, p in theirs.named_parameters()] == [
        (n, p.shape) for n, p in published.named_parameters()
    ]
    strides = [[m.stride for m in model.modules() if isinstance(m, torch.nn.Conv3d)] for model in (theirs, published)]
    assert strides[0] == strides[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
