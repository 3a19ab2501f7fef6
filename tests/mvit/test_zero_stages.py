"""Every ZeRO stage trains like plain PyTorch, and its checkpoints hold the very state, at any stage and world size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mvit
from mvit import distributed
from mvit.checkpoint import check_tiling, read_manifest, verify
from mvit.checkpoint_load import check_loaded, load_into, whole_weights
from mvit.checkpoint_save import Contents, Saver
from mvit.config import parse_config
from mvit.engine import Engine
from mvit.fragments import EMA, MASTER
from mvit.optim import OptimConfig, build_optimizer, parameter_groups
from mvit.variants import Variant, create_model
from mvit.zero import Precision, ZeroConfig
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed

pytestmark = pytest.mark.timeout(900)  # about a minute each on two idle cores

GLOBAL_BATCH, SIZE, CLASSES, STEPS = 8, 32, 5, 20
TINY = Variant("test", embed_dim=16, depths=(1, 1, 2, 1), num_heads=1)
SGD = OptimConfig(algorithm="sgd", weight_decay=0.01, layer_decay=0.8, clip_grad_norm=0.5)
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, layer_decay=0.8, ema_decay=0.9, clip_grad_norm=0.5)


def _model(checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    model = create_model(TINY, num_classes=CLASSES, input_size=(SIZE, SIZE), drop_path=0.3)
    if checkpointing:
        model.set_activation_checkpointing(("stage1", "stage2", "stage3", "stage4"))
    return model.train()


def _chunk(step: int, chunk: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels at positions [chunk * size, ...) of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)
    return images[chunk * size : (chunk + 1) * size], labels[chunk * size : (chunk + 1) * size]


def _lr(step: int) -> float:
    # At 1e-3 one max-pool argmax flips between equal runs after 17 steps; below that only rounding differs.
    return 3e-4 * min(step / 5, 1)


def _plain_losses(micro: int, steps: int = STEPS, optim: OptimConfig = OPTIM) -> list[float]:
    """Train without DeepSpeed in this process, chunk by chunk; the yardstick."""
    model = _model()
    groups = parameter_groups(model, optim, depth=TINY.depth)
    scales = {group.name: group.lr_scale for group in groups}
    optimizer = build_optimizer(model, groups, optim, fused=False)
    losses = []
    for step in range(1, steps + 1):
        total, chunks = 0.0, GLOBAL_BATCH // micro
        for chunk in range(chunks):
            images, labels = _chunk(step, chunk, micro)
            torch.manual_seed(1000 * step + chunk)
            loss = F.cross_entropy(model(images), labels) / chunks
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = _lr(step) * scales[group["name"]]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _engine(ranks: distributed.RankInfo, stage: int, micro: int, **options: Any) -> Engine:
    model = _model(options.pop("checkpointing", False))
    precision: Precision = options.pop("precision", "fp32")
    compile_backend = options.pop("compile_backend", None)
    optim: OptimConfig = options.pop("optim", OPTIM)
    return Engine(
        model,
        parameter_groups(model, optim, depth=TINY.depth),
        optim,
        ZeroConfig.model_validate({"stage": stage, "persistence_threshold": 0, **options}),
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=GLOBAL_BATCH // (micro * ranks.world_size),
        ranks=ranks,
        compile_backend=compile_backend,
    )


def _step(engine: Engine, step: int, micro: int, accumulation_steps: int) -> tuple[float, float]:
    """Train one step; returns the global loss and the gradient norm."""
    engine.train()
    total = torch.zeros(1)
    for index in range(accumulation_steps):
        chunk = index * engine.ranks.world_size + engine.ranks.rank
        images, labels = _chunk(step, chunk, micro)
        torch.manual_seed(1000 * step + chunk)
        loss = F.cross_entropy(engine(images.to(engine.dtype)).float(), labels)
        engine.backward(loss)
        total += loss.detach() / accumulation_steps
    norm = engine.update(_lr(step))
    return float(distributed.sum_over_ranks(total)) / engine.ranks.world_size, float(norm)


def _many_cases(cases: list[tuple[str, int, int, dict[str, Any]]], steps: int) -> dict[str, list[tuple[float, float]]]:
    ranks = distributed.start()
    found = {}
    for label, stage, micro, options in cases:
        engine = _engine(ranks, stage, micro, **options)
        accumulation = GLOBAL_BATCH // (micro * ranks.world_size)
        found[label] = [_step(engine, step, micro, accumulation) for step in range(1, steps + 1)]
        engine.close()
    distributed.shutdown()
    return found


def test_every_stage_gives_the_loss_curve_of_plain_pytorch() -> None:
    cases: list[tuple[str, int, int, dict[str, Any]]] = []
    for stage in range(4):
        cases.append((f"stage {stage}", stage, 4, {}))
        cases.append((f"stage {stage}, accumulation 2", stage, 2, {}))
        cases.append((f"stage {stage}, checkpointing", stage, 4, {"checkpointing": True}))
    cases.append(("stage 2, offload", 2, 4, {"offload_optimizer": True}))
    cases.append(("stage 3, offload all", 3, 4, {"offload_optimizer": True, "offload_parameters": True}))
    cases.append(("stage 3, as shipped", 3, 4, {"persistence_threshold": 100_000}))
    cases.append(("stage 1, compiled", 1, 4, {"compile_backend": "aot_eager"}))
    cases += [(f"stage {stage}, sgd", stage, 4, {"optim": SGD}) for stage in (0, 1, 3)]
    cases.append(("stage 2, sgd, offload", 2, 4, {"optim": SGD, "offload_optimizer": True}))
    plain = {micro: _plain_losses(micro) for micro in (4, 2)}
    plain_sgd = _plain_losses(4, optim=SGD)
    assert plain_sgd != pytest.approx(plain[4], rel=1e-4)
    found = run_distributed(_many_cases, 2, cases, STEPS)[0]
    norms = [norm for _, norm in found["stage 1"]]
    for label, _, micro, _ in cases:
        losses = [loss for loss, _ in found[label]]
        assert losses == pytest.approx(plain_sgd if "sgd" in label else plain[micro], rel=1e-5), label
        if micro == 4 and "sgd" not in label:
            assert [norm for _, norm in found[label]] == pytest.approx(norms, rel=1e-4), label


def test_bf16_follows_fp32_at_every_stage_and_one_process_needs_no_launcher() -> None:
    cases: list[tuple[str, int, int, dict[str, Any]]] = [("fp32", 1, 8, {})]
    cases += [(f"bf16 {stage}", stage, 8, {"precision": "bf16"}) for stage in range(4)]
    found = run_distributed(_alone, 1, cases)[0]
    reference = [loss for loss, _ in found.pop("fp32")]
    for label, steps in found.items():
        assert [loss for loss, _ in steps] == pytest.approx(reference, rel=3e-2), label
        assert [loss for loss, _ in steps] != reference, f"{label} computed in fp32"


def _alone(cases: list[tuple[str, int, int, dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    import os

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return _many_cases(cases, 8)


# --- checkpoints ----------------------------------------------------------------------------------------------


def _whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather the training state of all ranks by means the checkpoint code does not use."""
    pieces = distributed.gather_objects(
        [(f.name, f.numel, f.start, {k: v.clone() for k, v in f.states.items()}) for f in engine.fragments()]
    )
    whole: dict[str, torch.Tensor] = {}
    for rank_pieces in pieces:
        for name, numel, start, states in rank_pieces:
            for key, values in states.items():
                target = whole.setdefault(f"{key}:{name}", torch.full((numel,), float("nan")))
                target[start : start + len(values)] = values
    return whole


def _shapes() -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in _model().named_parameters()}


def _save(engine: Engine, run_dir: Path, step: int) -> None:
    saver = Saver(run_dir, engine.ranks)
    state = {"counters": engine.counters()}
    saver.begin(step, Contents(engine.fragments(), _shapes(), engine.hyperparameters(), state))
    (outcome,) = saver.finish()
    assert not outcome.error
    saver.close()


def _load(engine: Engine, run_dir: Path, step: int) -> None:
    manifest = read_manifest(run_dir / "checkpoints" / f"step_{step:08d}")
    with engine.writing() as fragments:
        load_into(manifest, fragments, _shapes())
    engine.restore_counters(step, manifest.state["counters"])
    check_loaded(manifest, engine.fragments(), engine.hyperparameters(), engine.ranks)


def _train_and_save(root: str, stages: list[tuple[int, Precision]]) -> dict[str, Any]:
    """Train 3 steps and save, then 3 more: returns the state at step 3 and the losses after it."""
    ranks = distributed.start()
    micro, accumulation = 4, 2 // ranks.world_size  # the same chunks, so the same drop path, at any world size
    found = {}
    for stage, precision in stages:
        engine = _engine(ranks, stage, micro, precision=precision)
        average = {key: value for key, value in _whole_state(engine).items() if key.startswith(MASTER)}
        for step in (1, 2, 3):
            _step(engine, step, micro, accumulation)
            state = _whole_state(engine)
            for key, value in average.items():  # the unsharded reference
                average[key] = 0.9 * value + 0.1 * state[key]
        for key, value in average.items():
            sharded = state[key.replace(MASTER, EMA, 1)]
            assert torch.allclose(sharded, value, rtol=1e-5, atol=1e-8), f"{key} at stage {stage}"
        _save(engine, Path(root) / f"{stage}-{precision}", 3)
        found[f"{stage}-{precision}"] = (
            _whole_state(engine),
            [_step(engine, step, micro, accumulation)[0] for step in (4, 5, 6)],
        )
        engine.close()
    distributed.shutdown()
    return found


def _load_everywhere(root: str, stages: list[tuple[int, Precision]]) -> dict[str, Any]:
    """Load every saved state into a fresh engine of every stage; returns states, losses and an EMA round trip."""
    ranks = distributed.start()
    micro, accumulation = 4, 2 // ranks.world_size  # the same chunks, so the same drop path, at any world size
    found = {}
    for stage, precision in stages:
        for saved, saved_precision in stages:
            if precision != saved_precision:
                continue
            engine = _engine(ranks, stage, micro, precision=precision)
            _load(engine, Path(root) / f"{saved}-{precision}", 3)
            state = _whole_state(engine)
            with engine.ema_weights():
                swapped = _whole_state(engine)
            assert all(torch.equal(value, state[key]) for key, value in _whole_state(engine).items())
            assert all(torch.equal(swapped[f"fp32:{n}"], state[f"ema:{n}"]) for n in _names(state))
            losses = [_step(engine, step, micro, accumulation)[0] for step in (4, 5, 6)]
            found[f"{saved}->{stage} {precision}"] = (state, losses)
            engine.close()
    distributed.shutdown()
    return found


def _names(state: dict[str, torch.Tensor]) -> list[str]:
    return [key.removeprefix("fp32:") for key in state if key.startswith("fp32:")]


def test_checkpoints_hold_the_very_state_at_any_stage_and_world_size(tmp_path: Path) -> None:
    stages: list[tuple[int, Precision]] = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
    saved = run_distributed(_train_and_save, 2, str(tmp_path), stages)[0]
    for label, (state, _) in saved.items():
        path = tmp_path / label / "checkpoints" / "step_00000003"
        assert verify(path) == [], label
        assert not any(value.isnan().any() for value in state.values()), f"{label}: the fragments leave gaps"
        for name, tensor in whole_weights(path):
            assert torch.equal(tensor.flatten(), state[f"{MASTER}:{name}"]), name
        for name, tensor in whole_weights(path, ema=True):
            assert torch.equal(tensor.flatten(), state[f"{EMA}:{name}"]), name
        assert any(not torch.equal(state[f"fp32:{n}"], state[f"ema:{n}"]) for n in _names(state))
    for world_size in (2, 1):
        loaded = run_distributed(_load_everywhere, world_size, str(tmp_path), stages)[0]
        assert len(loaded) == 4 * 4 + 2 * 2
        for label, (state, losses) in loaded.items():
            source = f"{label.split('->')[0]}-{label.split()[-1]}"
            wanted, wanted_losses = saved[source]
            assert state.keys() == wanted.keys()
            differing = [key for key in wanted if not torch.equal(state[key], wanted[key])]
            assert not differing, f"{label} at world size {world_size}: {differing[:5]}"
            tolerance = 0 if world_size == 2 and label[0] == label[3] else 2e-6 if "fp32" in label else 2e-2
            assert losses == pytest.approx(wanted_losses, rel=tolerance, abs=0), f"{label}, world size {world_size}"


class _CountsSwaps(Engine):
    """An engine without a model that counts its collective exchanges of weights and averages."""

    def __init__(self) -> None:
        self.swaps = 0

    def _swap_ema(self) -> None:
        self.swaps += 1


def test_an_error_during_evaluation_of_the_average_starts_no_collective() -> None:
    """It may be one rank's alone: that rank would wait for the others for ever instead of ending the job."""
    engine = _CountsSwaps()
    with engine.ema_weights():
        assert engine.swaps == 1
    assert engine.swaps == 2
    with pytest.raises(ArithmeticError), engine.ema_weights():
        raise ArithmeticError
    assert engine.swaps == 3


def test_gaps_and_overlaps_between_ranges_are_refused() -> None:
    shapes = {"w": [2, 3]}
    whole = {"file": "rank_00000.safetensors", "table": [["w", 6, 0, 4, 0]]}
    rest = {"file": "rank_00001.safetensors", "table": [["w", 6, 4, 2, 0]]}
    overlapping = {"file": "rank_00001.safetensors", "table": [["w", 6, 3, 3, 0]]}
    check_tiling([whole, rest], shapes)
    with pytest.raises(ValueError, match="w: 4 of 6 elements"):
        check_tiling([whole], shapes)
    with pytest.raises(ValueError, match="missing or stored twice"):
        check_tiling([whole, overlapping], shapes)
    with pytest.raises(ValueError, match="unknown parameter w"):
        check_tiling([whole, rest], {})


def _train_recomputing(config: dict[str, Any]) -> float:
    return mvit.train(parse_config(config), show_progress=False).metrics["loss"]


def test_ranks_that_drop_other_samples_recompute_in_the_same_order_under_stage_3(digits: Path, tmp_path: Path) -> None:
    """Graphs that differ between ranks would gather weights in other orders: a crash with gloo, a hang with NCCL."""
    sections: dict[str, Any] = {
        "model": {"drop_path": 0.4, "drop_path_mode": "skip"},
        "train": {"evaluate_every": 0, "micro_batch_size": 4, "activation_checkpointing": "all"},
        "schedule": {"epochs": 0.4},
        "zero": {"stage": 3},
    }
    config = tiny_config(digits, tmp_path, **sections)
    losses = run_distributed(_train_recomputing, 2, config.model_dump(mode="json"))
    assert losses[0] == losses[1] < 3
