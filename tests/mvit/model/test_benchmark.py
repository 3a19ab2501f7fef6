"""The model benchmark measures every contender in every setting and counts FLOPs as published."""

import json

import pytest
import torch

from mvit.benchmark import bench_model, count_gflops
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
    assert count_gflops(variant, input_size) == pytest.approx(published, rel=0.01)


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
        theirs = PEERS["torchvision"].build("mvitv2_small", (16, 224, 224))
        published = video.mvit_v2_s()
        ours = create_model("mvitv2_small", 400, (16, 224, 224))
    assert [(n, p.shape) for n, p in theirs.named_parameters()] == [
        (n, p.shape) for n, p in published.named_parameters()
    ]
    strides = [[m.stride for m in model.modules() if isinstance(m, torch.nn.Conv3d)] for model in (theirs, published)]
    assert strides[0] == strides[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
