"""What a rank holds at each ZeRO stage, by hand."""

from typing import Any

import pytest

from mvit.config import RunConfig, parse_config
from mvit.planner_memory import GIB, MARGIN, RUNTIME_BYTES, Memory, rank_memory
from mvit.planner_trace import StepTrace, parameter_sizes, trace_step

NO_ACTIVATIONS = StepTrace({}, {}, (), 0, (0.0, 0.0))
THOUSAND = [600, 400]


def small_config(stage: int = 1, precision: str = "fp32", **sections: Any) -> RunConfig:
    """Return a recipe whose states and activations are both some megabytes, and whose buckets are small."""
    tree: dict[str, Any] = {
        "name": "small",
        "model": {"num_classes": 10, "embed_dim": 32, "depths": (1, 2, 5, 1)},
        "image": {"image_size": (96, 96), "mix_prob": 0.0},
        "train": {"global_batch_size": 16, "micro_batch_size": 8, "precision": precision},
        "zero": {"stage": stage, "bucket_size": 500_000, "persistence_threshold": 100},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return parse_config(tree)


def states(world_size: int, stage: int, precision: str = "bf16", accumulation: int = 1, **sections: Any) -> Memory:
    return rank_memory(
        small_config(stage, precision, **sections),
        THOUSAND,
        NO_ACTIVATIONS,
        stage=stage,
        recompute=(),
        micro_batch_size=1,
        accumulation_steps=accumulation,
        world_size=world_size,
    )


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation", "parameters", "gradients", "optimizer"),
    [
        # of 1,000 parameters on 4 ranks; AdamW: two fp32 moments, and an fp32 master unless the weights are fp32 whole
        (0, "fp32", 1, 4000, 0, 8000),  # gradients come and go with the backward pass: they are in `activations`
        (0, "bf16", 1, 4000, 0, 8000),  # autocast over fp32 weights
        (0, "fp32", 4, 4000, 4000, 8000),  # accumulated, they stay
        (1, "bf16", 1, 2000, 500, 3000),
        (1, "bf16", 4, 2000, 2500, 3000),  # the whole gradient is accumulated
        (2, "bf16", 1, 2000, 500, 3000),
        (2, "bf16", 4, 2000, 1000, 3000),  # only the rank's share is
        (2, "fp32", 1, 4000, 1000, 3000),
        (3, "bf16", 1, 500, 500, 3000),
        (3, "fp32", 1, 1000, 1000, 3000),
    ],
)
def test_states_are_what_arithmetic_says(
    stage: int, precision: str, accumulation: int, parameters: int, gradients: int, optimizer: int
) -> None:
    memory = states(4, stage, precision, accumulation)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (parameters, gradients, optimizer)


def test_an_average_takes_four_bytes_more_sgd_four_less_and_offloading_all() -> None:
    assert states(4, 2, optim={"ema_decay": 0.999}).optimizer == 16 * 250
    assert states(4, 2, optim={"algorithm": "sgd"}).optimizer == 8 * 250
    assert states(4, 2, zero={"offload_optimizer": True}).optimizer == 0
    both = {"offload_optimizer": True, "offload_parameters": True, "persistence_threshold": 0}
    assert states(4, 3, zero=both).parameters == 0


def test_small_parameters_stay_whole_at_stage_3() -> None:
    assert states(4, 3, zero={"persistence_threshold": 500}).parameters == 500 + 2 * 400


def test_the_fp32_model_comes_to_the_device_whole_at_every_stage() -> None:
    assert [states(1000, stage).setup for stage in range(4)] == [4000, 4000, 4000, 4000]
    assert states(1000, 1, "fp32").setup == 8000  # DeepSpeed flattens it into a copy
    assert all(states(1000, stage).peak >= 4000 for stage in range(4))


def test_what_is_asked_of_a_gpu_is_the_peak_a_margin_and_the_runtime() -> None:
    memory = Memory(GIB, GIB, GIB, activations=3 * GIB, buffers=GIB, update=2 * GIB)
    assert memory.peak == 7 * GIB
    assert memory.needed == int(7 * GIB * MARGIN) + RUNTIME_BYTES
    assert Memory(GIB, GIB, GIB, activations=0, buffers=GIB, update=2 * GIB).peak == 5 * GIB  # one after the other
    assert Memory(GIB, 0, 0, activations=0, buffers=0, update=0, evaluation=6 * GIB).peak == 7 * GIB


def test_more_ranks_never_need_more_and_more_samples_never_less() -> None:
    config = small_config()
    trace, sizes = trace_step(config, autocast=False), parameter_sizes(config)

    def peak(stage: int, micro: int, ranks: int) -> int:
        return rank_memory(
            config,
            sizes,
            trace,
            stage=stage,
            recompute=(),
            micro_batch_size=micro,
            accumulation_steps=1,
            world_size=ranks,
        ).peak

    for stage in range(4):
        by_ranks = [peak(stage, 32, ranks) for ranks in (2, 8, 64, 1024)]
        assert by_ranks == sorted(by_ranks, reverse=True)
        by_samples = [peak(stage, micro, 8) for micro in (2, 8, 32, 128)]
        assert by_samples == sorted(by_samples)
