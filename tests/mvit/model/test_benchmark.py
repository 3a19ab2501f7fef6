"""The model benchmark measures every contender in every setting and counts FLOPs as published."""

import json

import pytest

from mvit.benchmark import bench_model, count_gflops


# Multiply-adds, as timm counts them and the paper rounds them
@pytest.mark.parametrize(
    ("variant", "published"), [("mvitv2_tiny", 4.70), ("mvitv2_small", 7.00), ("mvitv2_large", 43.87)]
)
def test_flops_are_the_published_ones(variant: str, published: float) -> None:
    assert count_gflops(variant, 224) == pytest.approx(published, rel=0.01)


def test_every_contender_is_measured_in_every_setting() -> None:
    pytest.importorskip("timm")
    rows = bench_model(
        ["mvitv2_tiny"], [32], ["fp32"], 1, forms=("matmul", "fused"), rounds=1, device="cpu", show=False
    )
    json.dumps(rows)
    assert [(row["contender"], row["kind"]) for row in rows] == [
        (name, kind) for kind in ("forward", "train") for name in ("timm", "mvit matmul", "mvit fused")
    ]
    for row in rows:
        assert 0 < row["seconds_min"] <= row["seconds_median"]
        assert row["speedup"] == pytest.approx(1.0) or row["contender"] != "timm"
    with pytest.raises(ValueError, match="cannot bench 'keras'; choose from"):
        bench_model(against=["keras"])
