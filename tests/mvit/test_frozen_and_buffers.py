"""Frozen parameters and buffers are part of a checkpoint, at every ZeRO stage, world size and precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mvit import distributed
from mvit.checkpoint import CheckpointError, read_manifest
from mvit.checkpoint_load import check_loaded, load_buffers, load_into, whole_weights
from mvit.checkpoint_save import Contents, Saver
from mvit.engine import Engine
from mvit.optim import OptimConfig, parameter_groups
from mvit.variants import Variant, create_model
from mvit.zero import Precision, ZeroConfig
from tests.ranks import run_distributed

pytestmark = pytest.mark.timeout(900)
TINY = Variant("test", embed_dim=16, depths=(1, 1, 1, 1), num_heads=1)
OPTIM = OptimConfig(lr=1e-3, layer_decay=0.8, ema_decay=0.9)
FROZEN = ("patch_embed.", "blocks.0.")
CASES: list[tuple[int, Precision]] = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]


def _model(seed: int, frozen: tuple[str, ...] = FROZEN) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = create_model(TINY, num_classes=3, input_size=(32, 32))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    model.register_buffer("running_mean", torch.rand(4) if seed == 0 else torch.zeros(4))
    model.register_buffer("count", torch.tensor(7 if seed == 0 else 0))
    model.register_buffer("scratch", torch.rand(2), persistent=False)
    return model


def _engine(ranks: distributed.RankInfo, seed: int, stage: int, precision: Precision, **options: Any) -> Engine:
    model = _model(seed, **options)
    return Engine(
        model,
        parameter_groups(model, OPTIM, depth=TINY.depth),
        OPTIM,
        ZeroConfig(stage=stage, persistence_threshold=0 if stage == 3 else 100_000),  # type: ignore[arg-type]
        precision=precision,
        micro_batch_size=2,
        accumulation_steps=1,
        ranks=ranks,
    )


def _shapes() -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in _model(0).named_parameters()}


def _train_and_save(root: str) -> None:
    ranks = distributed.start()
    for stage, precision in CASES:
        engine = _engine(ranks, 0, stage, precision)
        for step in (1, 2):
            torch.manual_seed(step)
            loss = F.cross_entropy(engine(torch.randn(2, 3, 32, 32).to(engine.dtype)).float(), torch.tensor([0, 1]))
            engine.backward(loss)
            engine.update(1e-3)
        saver = Saver(Path(root) / f"{stage}-{precision}", ranks)
        fragments, buffers = engine.fragments(), engine.buffers()
        assert {f.name for f in fragments if f.frozen} <= {n for n in _shapes() if n.startswith(FROZEN)}
        assert set(buffers) == {"running_mean", "count"}
        state = {"counters": engine.counters()}
        saver.begin(2, Contents(fragments, _shapes(), engine.hyperparameters(), state, buffers=buffers))
        assert [outcome.error for outcome in saver.finish()] == [""]
        saver.close()
        engine.close()
    distributed.shutdown()


def _load_everywhere(root: str) -> list[str]:
    """Load every state into every other stage of the same precision; returns what was compared."""
    ranks, compared = distributed.start(), []
    for stage, precision in CASES:
        for saved_stage, saved_precision in CASES:
            if precision != saved_precision or stage == saved_stage:
                continue
            manifest = read_manifest(Path(root) / f"{saved_stage}-{precision}" / "checkpoints" / "step_00000002")
            engine = _engine(ranks, 1, stage, precision)
            with engine.writing() as fragments:
                load_into(manifest, fragments, _shapes())
            load_buffers(manifest, engine.buffers())
            engine.restore_counters(2, manifest.state["counters"])
            check_loaded(manifest, engine.fragments(), engine.hyperparameters(), ranks)
            buffers = engine.buffers()
            assert torch.equal(buffers["running_mean"], _model(0).get_buffer("running_mean"))  # fp32 in bf16, too
            assert int(buffers["count"]) == 7
            with torch.no_grad():  # the forward pass has the frozen weights, too
                torch.manual_seed(9)
                images = torch.randn(2, 3, 32, 32).to(engine.dtype)
                engine.eval()
                logits = engine(images).float()
            plain = _model(1).eval()
            plain.load_state_dict(dict(whole_weights(manifest.path)), strict=False)
            tolerance = 1e-5 if precision == "fp32" else 0.05
            assert torch.allclose(logits, plain.to(engine.dtype)(images).float(), atol=tolerance)
            spoilt = next(f for f in engine.fragments() if f.frozen)
            spoilt.weights[0] += 1
            with pytest.raises(CheckpointError, match="the frozen weights of patch_embed"):
                check_loaded(manifest, engine.fragments(), engine.hyperparameters(), ranks)
            engine.close()
            compared.append(f"{saved_stage} -> {stage}")
    engine = _engine(ranks, 1, 1, "bf16", frozen=("patch_embed.",))
    manifest = read_manifest(Path(root) / "1-bf16" / "checkpoints" / "step_00000002")
    with pytest.raises(CheckpointError, match=r"blocks\.0.* is frozen in the checkpoint or in the run, but not in"):
        load_into(manifest, engine.fragments(), _shapes())
    with pytest.raises(CheckpointError, match="differ in count"):
        load_buffers(manifest, {"running_mean": torch.zeros(4)})
    engine.close()
    distributed.shutdown()
    return compared


def test_frozen_parameters_and_buffers_come_back_at_any_stage_and_world_size(tmp_path: Path) -> None:
    run_distributed(_train_and_save, 2, str(tmp_path))
    initial = dict(_model(0).named_parameters())
    for stage, precision in CASES:
        path = tmp_path / f"{stage}-{precision}" / "checkpoints" / "step_00000002"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for ema in (False, True):
            weights = dict(whole_weights(path, ema=ema))
            assert weights.keys() == initial.keys()
            for name, tensor in weights.items():
                unchanged = torch.equal(tensor, initial[name].to(dtype).float())
                assert unchanged == name.startswith(FROZEN), name
    assert len(run_distributed(_load_everywhere, 3, str(tmp_path))[0]) == 3 * 2 + 2
