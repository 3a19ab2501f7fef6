"""The full training state of mvitv2_large goes to disk and comes back; that of huge as well (slow)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvit import distributed
from mvit.benchmark_checkpoint import bench_checkpoint
from mvit.checkpoint import CheckpointError, read_manifest, verify
from mvit.checkpoint_load import check_loaded, load_into
from mvit.checkpoint_save import Contents, Saver
from mvit.engine import Engine
from mvit.fingerprint import state_fingerprints
from mvit.optim import OptimConfig, parameter_groups
from mvit.variants import create_model
from mvit.zero import ZeroConfig
from tests.ranks import run_distributed

OPTIM = OptimConfig(layer_decay=0.8, ema_decay=0.9999)


def _round_trip(folder: str, variant: str) -> tuple[int, int]:
    """Save, spoil every state, load; returns the number of parameters and the bytes saved."""
    ranks = distributed.start()
    torch.manual_seed(0)
    model = create_model(variant)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    groups = parameter_groups(model, OPTIM, depth=len(model.blocks))
    options: dict[str, Any] = {"precision": "bf16", "micro_batch_size": 1, "accumulation_steps": 1, "ranks": ranks}
    engine = Engine(model, groups, OPTIM, ZeroConfig(stage=2), **options)
    for fragment in engine.fragments():
        fragment.states["exp_avg"].copy_(fragment.states["fp32"] * 0.1)
        fragment.states["exp_avg_sq"].copy_(fragment.states["fp32"].square())
    names, states = list(shapes), ("fp32", "exp_avg", "exp_avg_sq", "ema")
    wanted = state_fingerprints(engine.fragments(), names, states, ranks)
    saver = Saver(Path(folder), ranks)
    counters = engine.counters()
    saver.begin(5, Contents(engine.fragments(), shapes, engine.hyperparameters(), {"counters": counters}))
    with engine.writing() as fragments:  # beside the write
        for fragment in fragments:
            for values in fragment.states.values():
                values.zero_()
    (outcome,) = saver.finish()
    assert not outcome.error
    saver.close()
    manifest = read_manifest(outcome.path)
    assert verify(outcome.path) == []
    with pytest.raises(CheckpointError, match="part\\(s\\) of the training state differ"):
        check_loaded(manifest, engine.fragments(), engine.hyperparameters(), ranks)
    with engine.writing() as fragments:
        load_into(manifest, fragments, shapes)
    engine.restore_counters(5, counters)
    check_loaded(manifest, engine.fragments(), engine.hyperparameters(), ranks)
    assert state_fingerprints(engine.fragments(), names, states, ranks) == wanted == manifest.fingerprints
    engine.close()
    distributed.shutdown()
    return sum(torch.Size(shape).numel() for shape in shapes.values()), outcome.num_bytes


@pytest.mark.timeout(900)
def test_the_state_of_large_is_saved_beside_training_and_comes_back(tmp_path: Path) -> None:
    (elements, num_bytes) = run_distributed(_round_trip, 1, str(tmp_path), "mvitv2_large")[0]
    assert elements == pytest.approx(218e6, rel=0.01)
    assert num_bytes == pytest.approx(16 * elements, rel=0.01)  # masters, two moments, average


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_state_of_huge_is_saved_and_loaded(tmp_path: Path) -> None:
    rows = run_distributed(_bench_huge, 1, str(tmp_path))[0]
    for row in rows:
        print(row)
    assert rows[0]["gib"] == pytest.approx(667e6 * 12 / 2**30, rel=0.01)


def _bench_huge(folder: str) -> list[dict[str, Any]]:
    return bench_checkpoint("mvitv2_huge", against=(), rounds=1, folder=Path(folder))
