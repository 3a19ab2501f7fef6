"""A training step costs what it cost: FLOPs, allocations and host reads of three small models, none of them a time.

The figures stand in step_cost.json. Where a change is meant to cost more, record them anew and let the diff show it:

    MVIT_RECORD_STEP_COST=1 python -m pytest tests/mvit/test_step_cost.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvit.detection.detector import create_detector
from mvit.model.backbone import MViT
from mvit.planner_record import Recorder
from mvit.tasks.classification import soft_cross_entropy
from mvit.variants import Variant, create_backbone, create_model
from tests.mvit.detection.tiny import SMALL, shapes

RECORDED = Path(__file__).with_name("step_cost.json")
RECORD = "MVIT_RECORD_STEP_COST"
ALLOWED = 1.05
NARROW = Variant("narrow", embed_dim=16, depths=(1, 2, 2, 1), num_heads=1, drop_path=0.0)
Step = Callable[[], Tensor]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: `.item()`, `if tensor`, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func._overloadpacket.__name__ for name in self.WAITING)
        return func(*args, **(kwargs or {}))


def classifier_step(input_size: tuple[int, ...], device: str = "cpu") -> tuple[nn.Module, Step]:
    """Build a classifier and its step: masked drop path, as on a GPU, soft targets, bf16 by autocast."""
    torch.manual_seed(0)
    model = create_model(NARROW, 5, input_size, drop_path=0.3, drop_path_mode="mask").to(device).train()
    inputs, targets = torch.randn(2, 3, *input_size, device=device), torch.rand(2, 5, device=device)

    def step() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(inputs)
        return soft_cross_entropy(logits, targets)

    return model, step


def detector_step() -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    detector = create_detector(create_backbone(NARROW), "cascade_mask_rcnn", 3, SMALL).train()
    batch = shapes(2, 96, seed=0)

    def step() -> Tensor:
        torch.manual_seed(1)
        losses = detector(*batch)
        assert isinstance(losses, dict)
        return sum(losses.values(), torch.zeros(()))

    return detector, step


STEPS: dict[str, Callable[[], tuple[nn.Module, Step]]] = {
    "image": lambda: classifier_step((64, 64)),
    "video": lambda: classifier_step((4, 64, 64)),
    "detection": detector_step,
}


def cost_of(name: str) -> dict[str, int]:
    return measure(*STEPS[name]())


def risen(recorded: dict[str, int], cost: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {key: (recorded[key], now) for key, now in cost.items() if now > ALLOWED * recorded[key]}


def measure(model: nn.Module, step: Step) -> dict[str, int]:
    """Run one step twice, the first time for what is made once, and count the second."""
    step().backward()
    model.zero_grad(set_to_none=True)
    reads = HostReads()
    recorder = Recorder([*model.parameters(), *model.buffers()])
    with recorder, reads:
        recorder.mark("step")
        step().backward()
    record = recorder.stretches["step"]
    made = [size for size in record.held if size > 0]
    return {
        "flops": sum(record.flops),
        "allocations": len(made),
        "allocated_bytes": sum(made),
        "peak_bytes": recorder.peak_bytes,
        "host_reads": reads.count,
    }


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_no_more_than_recorded(name: str) -> None:
    cost = cost_of(name)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get(RECORD) == "1":
        RECORDED.write_text(json.dumps(recorded | {name: cost}, indent=2, sort_keys=True) + "\n")
        return
    dearer = risen(recorded[name], cost)
    assert not dearer, (
        f"the {name} step costs over 5 % more than recorded (recorded, now): {dearer}. "
        f"If that is meant: {RECORD}=1 python -m pytest tests/mvit/{Path(__file__).name}, and say why in the commit"
    )


def test_a_rise_is_seen_and_a_fall_is_not() -> None:
    """Recomputation costs FLOPs and allocations, and saves memory."""
    model, step = STEPS["image"]()
    assert isinstance(model, MViT)
    plain = cost_of("image")
    model.set_activation_checkpointing(list(model.stages))
    assert set(risen(plain, measure(model, step))) == {"flops", "allocations", "allocated_bytes"}
    assert set(risen(plain, plain | {"host_reads": 1})) == {"host_reads"}
    assert not risen(plain, {key: value // 2 for key, value in plain.items()})


@pytest.mark.parametrize("name", ["image", "video"])
def test_nothing_in_a_step_waits_for_the_device(name: str) -> None:
    model, step = STEPS[name]()
    with HostReads() as reads:
        step().backward()
    assert reads.count == 0
    with HostReads() as reads:
        float(next(model.parameters()).detach().sum())
    assert reads.count == 1  # the count itself works


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("input_size", [(64, 64), (4, 64, 64)])
def test_no_operation_of_a_step_synchronises_a_gpu(input_size: tuple[int, ...]) -> None:
    _, step = classifier_step(input_size, "cuda")
    step().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step().backward()
        with pytest.raises(RuntimeError, match="synchroniz"):  # the watch itself works
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
