"""The trace of a step without memory foresees what the step holds when it runs, for any batch and number of blocks."""

from typing import Any

import pytest
import torch

from mvit.benchmark_plan import host_allocations
from mvit.config import RunConfig
from mvit.planner_trace import STAGES, record_step, trace_step
from mvit.tasks.classification import build_classifier, soft_cross_entropy
from tests.mvit.test_planner_memory import small_config


def _measured(config: RunConfig, batch: int, *, autocast: bool) -> int:
    """Run forward and backward for real and return the most bytes the host allocator held, gradients kept."""
    model = build_classifier(config).train()
    images, targets = torch.randn(batch, 3, *config.input_size), torch.rand(batch, config.model.num_classes)
    with host_allocations(active=True) as found:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(images + 0)
        soft_cross_entropy(logits, targets).backward()
    return found.peaks(0)[1]


@pytest.mark.parametrize(("autocast", "kept"), [(False, "off"), (True, "off"), (False, ("stage1", "stage3"))], ids=str)
def test_what_forward_and_backward_hold_is_foreseen_within_a_tenth(autocast: bool, kept: Any) -> None:
    config = small_config(0, "bf16" if autocast else "fp32", train={"activation_checkpointing": kept})
    trace = trace_step(config, autocast=autocast, target="cpu", own_checkpointing=True)
    for batch in (3, 9):  # neither was traced
        foreseen = trace.peak_bytes(batch, config.train.checkpointed_stages, keep_gradients=True)
        foreseen -= batch * trace.sample_bytes  # the loader's pixels, which this step has not
        assert foreseen == pytest.approx(_measured(config, batch, autocast=autocast), rel=0.10)


def test_blocks_and_batches_that_did_not_run_are_as_if_they_had() -> None:
    config = small_config(1, "bf16", model={"depths": (1, 2, 7, 4)})
    trace = trace_step(config, autocast=False)
    for recompute, stages in ((False, ()), (True, STAGES)):
        run = record_step(config, 5, recompute, autocast=False, target="cuda")  # all 14 blocks
        whole = trace.peak_bytes(5, stages, keep_gradients=True) - 5 * trace.sample_bytes
        assert whole == pytest.approx(run.peak_bytes, rel=1e-3)
        flops = sum(sum(stretch.flops) for stretch in run.stretches.values())
        passes = [trace.cost(5, stages, backward=back) for back in (False, True)]
        assert sum(float((cost.flops * cost.times).sum()) for cost in passes) == pytest.approx(flops, rel=1e-3)


def test_recomputing_more_stages_holds_less_and_computes_more() -> None:
    config = small_config(1, "bf16")
    trace = trace_step(config, autocast=False)
    choices = [STAGES[:count] for count in range(len(STAGES) + 1)]
    held = [trace.peak_bytes(16, stages, keep_gradients=False) for stages in choices]
    work = [float(trace.cost(16, stages, backward=True).flops.sum()) for stages in choices]
    assert held == sorted(held, reverse=True)
    assert work == sorted(work)
    assert trace.evaluation_bytes(16) < held[0]


def test_a_trace_draws_no_random_numbers_and_drop_path_is_planned_for_with_nothing_dropped() -> None:
    before = torch.get_rng_state()
    dropping = small_config(1, "fp32", model={"drop_path": 0.5, "head_dropout": 0.1})
    peaks = [
        trace_step(config, autocast=False, target="cpu", own_checkpointing=True).peak_bytes(8, (), keep_gradients=True)
        for config in (dropping, small_config(1, "fp32", model={"drop_path": 0.0, "head_dropout": 0.1}))
    ]
    assert peaks[0] == peaks[1]
    assert torch.equal(torch.get_rng_state(), before)
