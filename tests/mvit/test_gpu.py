"""What only a GPU can show: fp16 with its loss scale, NCCL, the fused attention, and resuming there."""

from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

import mvit
from mvit import distributed
from mvit.checkpoint import checkpoint_path
from mvit.checkpoint_load import whole_state, whole_weights
from mvit.checkpoint_save import Contents, Saver
from mvit.config import parse_config
from mvit.fragments import MASTER, MOMENTS, Fragment
from mvit.variants import create_model
from tests.mvit.test_detection_training import detection_config, shapes
from tests.mvit.test_training import records, tiny_config
from tests.ranks import run_distributed

__all__ = ["shapes"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _train(config: dict[str, Any], stop_after: int | None = None) -> int:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return stop_after is not None and calls >= stop_after

    return mvit.train(parse_config(config), stop_requested=stop, show_progress=False).step


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_stage_trains_and_resumes_on_a_gpu(digits: Path, tmp_path: Path, stage: int, precision: str) -> None:
    options = {"zero": {"stage": stage}, "train": {"precision": precision}}
    whole, broken = (tiny_config(digits, tmp_path, name, **options) for name in ("whole", "broken"))
    assert run_distributed(_train, 1, whole.model_dump(mode="json")) == [24]
    run_distributed(_train, 1, broken.model_dump(mode="json"), 13)
    assert run_distributed(_train, 1, broken.model_dump(mode="json")) == [24]
    losses = [[record["loss"] for record in records(config.run_dir)] for config in (whole, broken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    if precision == "fp16":
        # The scale starts at 2^16 and has to come down: skipped steps are counted and do not stop the run.
        assert all("skipped_steps" in record for record in records(whole.run_dir))


def test_a_save_beside_training_holds_what_was_there_when_it_began(alone: distributed.RankInfo, tmp_path: Path) -> None:
    """The copies to page-locked memory are queued before the next kernels, which may already change the state."""
    values = {state: torch.full((50_000_000,), 1.0, device="cuda") for state in (MASTER, *MOMENTS)}
    fragment = Fragment("w", 50_000_000, 0, values, True, values[MASTER])
    saver = Saver(tmp_path, alone)
    saver.reserve([fragment])
    saver.begin(1, Contents([fragment], {"w": [50_000_000]}, [], {}, {"device": torch.cuda.get_rng_state()}))
    for tensor in values.values():
        tensor.fill_(2.0)
    (outcome,) = saver.finish()
    saver.close()
    assert not outcome.error
    assert all(tensor.eq(1.0).all() for _, tensor in whole_weights(outcome.path))


@pytest.mark.parametrize(("kind", "stage"), [("mask_rcnn", 1), ("cascade_mask_rcnn", 2), ("cascade_mask_rcnn", 3)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_detector_trains_in_half_precision_on_a_gpu(
    shapes: Path, tmp_path: Path, kind: str, stage: int, precision: str
) -> None:
    heads = {"kind": kind, "box_channels": 8, "box_loss_beta": 0.1}
    config = detection_config(
        shapes, tmp_path, detector=heads, zero={"stage": stage}, train={"precision": precision}, optim={"lr": 3e-3}
    )
    assert run_distributed(_train, 1, config.model_dump(mode="json")) == [20]
    logged = records(config.run_dir)
    assert all(isfinite(record["loss"]) for record in logged)
    assert sum(record["loss"] for record in logged[-4:]) < sum(record["loss"] for record in logged[:4])
    if precision == "fp16":
        # The first scale of 2^16 may be too much for the gradients; it has to come down soon
        assert logged[-1]["skipped_steps"] < 10
    for name, tensor in whole_state(checkpoint_path(config.run_dir, 20)):
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("form", ["fused", "matmul"])
@pytest.mark.parametrize("size", [(224, 224), (192, 256)])
def test_attention_forms_agree_on_a_gpu(form: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = create_model("mvitv2_tiny", num_classes=10, attention_form="reference").cuda().eval()
    images = torch.randn(2, 3, *size, device="cuda")
    with torch.no_grad():
        wanted = model(images)
        model.set_attention_form(form)
        assert torch.allclose(model(images), wanted, atol=2e-3)  # TF32 may be on
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.allclose(model(images).float(), wanted, atol=5e-2)


@pytest.mark.parametrize(("variant", "stage"), [("mvitv2_large", 2), ("mvitv2_huge", 3)])
def test_large_and_huge_take_a_training_step(digits: Path, tmp_path: Path, variant: str, stage: int) -> None:
    config = tiny_config(
        digits,
        tmp_path,
        model={"variant": variant, "embed_dim": None, "depths": None, "drop_path": 0.5},
        image={"image_size": (224, 224)},
        train={"precision": "bf16", "activation_checkpointing": "all", "global_batch_size": 32},
        schedule={"epochs": 0.09, "warmup_epochs": 0.0},
        optim={"ema_decay": None},
        zero={"stage": stage},
    )
    assert run_distributed(_train, 1, config.model_dump(mode="json")) == [4]
    assert all(record["grad_norm"] > 0 for record in records(config.run_dir))
