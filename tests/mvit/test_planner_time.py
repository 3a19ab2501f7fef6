"""Times and volumes of a step on many GPUs: the stated model, by hand."""

import numpy as np
import pytest

from mvit.planner_time import (
    GPUS,
    KERNEL_SECONDS,
    LAUNCH_SECONDS,
    LINK_SHARE,
    MATRIX_SHARE,
    MEMORY_SHARE,
    NETWORK_LATENCY,
    NODE_LATENCY,
    Ranks,
    StepTime,
    gpu_of_device,
    pass_seconds,
    step_seconds,
)
from mvit.planner_trace import Cost

H100 = GPUS["h100"]


def _step(ranks: int, stage: int, **changed: float) -> StepTime:
    values = {
        "forward": 0.1,
        "backward": 0.2,
        "accumulation_steps": 1,
        "num_parameters": 1_000_000_000,
        "num_tensors": 1000,
        "gradient_bytes": 2,
        "bucket_size": 200_000_000,
        "overlap": True,
        "live_elements": 1_000_000_000,
    } | changed
    return step_seconds(ranks=Ranks(ranks, 8, H100), stage=stage, **values)  # pyright: ignore[reportArgumentType]


def test_one_gpu_sends_nothing() -> None:
    assert Ranks(1, 8, H100).seconds(1e9, 10) == 0.0
    assert [_step(1, stage).sent_bytes for stage in range(4)] == [0, 0, 0, 0]


def test_a_ring_within_a_node_takes_its_links_and_between_nodes_all_adapters_of_one() -> None:
    hops = NODE_LATENCY * 7
    assert Ranks(8, 8, H100).seconds(9e9, 1) == pytest.approx(9 / (450 * LINK_SHARE) + hops)
    # 8 adapters of 50 GB/s each are slower than NVLink
    assert Ranks(16, 8, H100).seconds(9e9, 1) == pytest.approx(9 / (400 * LINK_SHARE) + hops + 2 * NETWORK_LATENCY)
    assert Ranks(1024, 8, H100).seconds(0, 1) == pytest.approx(hops + 2 * 7 * NETWORK_LATENCY)  # 128 nodes: depth 7
    assert Ranks(4, 1, H100).seconds(1e9, 0) == pytest.approx(1 / (50 * LINK_SHARE))  # one GPU in a node


@pytest.mark.parametrize(
    ("stage", "accumulation", "volume"),
    [  # of 2 GB of gradients on 16 ranks, each rank sends 15/16 of so many times 2 GB
        (0, 1, 2),
        (0, 4, 2),
        (1, 1, 3),  # all-reduce, and new weights gathered
        (1, 4, 3),
        (2, 4, 9),  # reduced after every micro-batch
        (3, 1, 2.5),  # weights gathered once, and the half that is not kept again; gradients scattered
        (3, 4, 10),
    ],
)
def test_what_a_rank_sends_in_a_step(stage: int, accumulation: int, volume: float) -> None:
    step = _step(16, stage, accumulation_steps=accumulation)
    assert step.sent_bytes == pytest.approx(volume * 2e9 * 15 / 16)
    assert step.network_bytes == step.sent_bytes
    assert _step(8, stage).network_bytes == 0


def test_what_travels_beside_the_backward_pass_costs_its_last_bucket_only() -> None:
    hidden, shown = _step(16, 2), _step(16, 2, overlap=False)
    assert hidden.communication < shown.communication
    assert _step(16, 2, backward=1e-4).communication > 0.9 * shown.communication
    assert hidden.total == pytest.approx(0.1 + 0.2 + hidden.communication + hidden.update)


def test_more_nodes_never_communicate_faster_and_sharding_shortens_the_update() -> None:
    for stage in range(4):
        seconds = [_step(ranks, stage, overlap=False).communication for ranks in (8, 16, 64, 256, 1024)]
        assert seconds == sorted(seconds)
    assert _step(1024, 1).update == pytest.approx(_step(1, 1).update / 1024)


def test_an_operation_takes_its_matrix_time_or_its_memory_time_and_a_kernel_at_least() -> None:
    flops, traffic = np.array([1e12, 0.0, 0.0]), np.array([0.0, 1e9, 10.0])
    cost = Cost(flops, traffic, np.array([1.0, 2.0, 1.0]))
    expected = 1e12 / (989e12 * MATRIX_SHARE) + 2 * 1e9 / (3350e9 * MEMORY_SHARE) + KERNEL_SECONDS
    assert pass_seconds(cost, H100, "bf16", compiled=False) == pytest.approx(expected)
    assert pass_seconds(cost, H100, "bf16", compiled=True) < expected
    assert pass_seconds(cost, H100, "fp32", compiled=False) > expected
    many = Cost(np.zeros(1), np.zeros(1), np.array([1000.0]))  # the host cannot launch them faster
    assert pass_seconds(many, H100, "bf16", compiled=False) == pytest.approx(1000 * LAUNCH_SECONDS)


def test_every_gpu_says_where_its_figures_come_from_and_is_found_by_the_name_that_cuda_gives_it() -> None:
    assert all(gpu.source for gpu in GPUS.values())
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA B200": "b200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA L40S": "l40s",
        "Tesla V100-SXM2-16GB": "v100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    assert {name: gpu_of_device(name) for name in names} == names
    assert set(names.values()) == GPUS.keys()
    assert gpu_of_device("NVIDIA T4") is None
