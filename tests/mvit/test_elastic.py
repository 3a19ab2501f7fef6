"""A run moves between numbers of ranks and ZeRO stages, killed at random steps: samples, state and losses go on."""

import itertools
import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import mvit
from mvit.checkpoint import newest_valid, read_manifest
from mvit.config import RunConfig, parse_config
from mvit.distributed import RankInfo
from mvit.engine import Engine
from mvit.fingerprint import state_fingerprints
from tests.mvit.test_training import records, tiny_config
from tests.ranks import run_distributed, run_until_killed

WORLD_SIZES = (1, 4, 2, 3)
LAST_STEP = 14
# Gradients are summed over other ranks in another order, so losses differ by rounding, and a max-pool whose two
# largest inputs are that close may pick the other one.
TOLERANCE = 1e-4


def elastic_config(
    digits: Path, output_dir: Path, name: str, stage: int, checkpointing: str, *, offload: bool = False
) -> RunConfig:
    """Return a run whose 12 chunks of 2 samples divide over 1, 2, 3 and 4 ranks; nine parameter groups."""
    return tiny_config(
        digits,
        output_dir,
        name,
        optim={"lr": 3e-4, "layer_decay": 0.8},
        schedule={"epochs": LAST_STEP * 24.5 / 1442, "warmup_epochs": 0.05},
        train={
            "global_batch_size": 24,
            "micro_batch_size": 2,
            "save_every": 2,
            "keep_last": 2,
            "evaluate_every": 0,
            "activation_checkpointing": checkpointing,
        },
        zero={"stage": stage, "offload_optimizer": offload},
    )


class _Recorder:
    """Notes which samples this rank computes, and the fingerprints of the state it starts from."""

    def __init__(self, file: Path, ranks: RankInfo, names: Sequence[str]) -> None:
        self._file, self._ranks, self._names = file, ranks, names

    def _write(self, record: dict[str, Any]) -> None:
        with open(self._file, "a") as file:
            file.write(json.dumps(record) + "\n")

    def started(self, step: int, engine: Engine) -> None:
        states = ("fp32", "exp_avg", "exp_avg_sq", "ema")
        found = state_fingerprints(engine.fragments(), self._names, states, engine.ranks) if self._names else {}
        self._write({"started": step, "state": found})

    def read(self, step: int, accumulation: int, batch: Any) -> None:
        chunk = accumulation * self._ranks.world_size + self._ranks.rank
        self._write({"step": step, "chunk": chunk, "keys": list(batch.keys)})

    def updated(self, step: int, losses: Sequence[Tensor], grad_norm: Tensor, lr: float, engine: Engine) -> None:
        pass


def _segment(dump: dict[str, Any], notes: str, die_at: tuple[int, int] | None) -> None:
    """Train; rank r kills itself when it is asked about stopping for the n-th time."""
    config, calls = parse_config(dump), 0
    ranks = mvit.distributed.start()
    names = list(read_manifest(newest).shapes) if (newest := newest_valid(config.run_dir)) else []

    def stop() -> bool:
        nonlocal calls
        calls += 1
        if die_at == (ranks.rank, calls):
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    recorder = _Recorder(Path(f"{notes}_{ranks.rank}.jsonl"), ranks, names)
    mvit.train(config, stop_requested=stop, show_progress=False, observer=recorder)


def _read_notes(folder: Path, label: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob(f"{label}_*.jsonl")) for line in file.open()]


def _batches(notes: Sequence[dict[str, Any]]) -> dict[int, list[str]]:
    """Return each step's global batch, in the order of its chunks."""
    chunks = {(note["step"], note["chunk"]): note["keys"] for note in notes if "keys" in note}
    steps = sorted({step for step, _ in chunks})
    return {step: [key for at in sorted(chunks) if at[0] == step for key in chunks[at]] for step in steps}


def _check_chain(digits: Path, folder: Path, stages: Sequence[int], checkpointing: Sequence[str], seed: int) -> float:
    """Run 1 → 4 → 2 → 3 ranks through `stages`; returns the largest relative loss difference to one quiet run."""
    whole = elastic_config(digits, folder, "whole", 1, "off")
    run_distributed(_segment, 1, whole.model_dump(mode="json"), str(folder / "whole"), None)
    undisturbed, draw = _batches(_read_notes(folder, "whole")), random.Random(seed)
    assert list(undisturbed) == list(range(1, LAST_STEP + 1))
    seen: dict[int, list[str]] = {}
    for index, (world_size, stage) in enumerate(zip(WORLD_SIZES, stages, strict=True)):
        config = elastic_config(digits, folder, "moved", stage, checkpointing[index], offload=index == 1 and stage > 0)
        newest = newest_valid(config.run_dir)
        saved = read_manifest(newest) if newest else None
        label = f"part{index}"
        job = (config.model_dump(mode="json"), str(folder / label))
        if index < len(stages) - 1:
            run_until_killed(_segment, world_size, *job, (draw.randrange(world_size), draw.randint(3, 5)))
        else:
            run_distributed(_segment, world_size, *job, None)
        notes = _read_notes(folder, label)
        starts = [note for note in notes if "started" in note]
        assert {note["started"] for note in starts} == {saved.step if saved else 0}
        if saved is not None:
            assert saved.world_size == WORLD_SIZES[index - 1]
            where = f"{world_size} ranks, stage {stage}: the state is not the saved one"
            assert all(note["state"] == saved.fingerprints for note in starts), where
            assert len(saved.groups) > 2
        seen |= _batches(notes)
    assert seen == undisturbed, "the global batches are not those of the quiet run"
    losses = [{r["step"]: r["loss"] for r in records(folder / name)} for name in ("whole", "moved")]
    assert losses[0].keys() == losses[1].keys() == undisturbed.keys()
    return max(abs(losses[1][step] / loss - 1) for step, loss in losses[0].items())


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_at_other_world_sizes_and_stages(digits: Path, tmp_path: Path) -> None:
    found = _check_chain(digits, tmp_path, (0, 3, 1, 2), ("off", "all", "off", "all"), seed=1)
    assert found < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stages", list(itertools.permutations(range(4))), ids=str)
def test_the_whole_matrix_of_world_sizes_and_stages(digits: Path, tmp_path: Path, stages: tuple[int, ...]) -> None:
    draw = random.Random(str(stages))
    found = _check_chain(digits, tmp_path, stages, [draw.choice(("off", "all")) for _ in stages], draw.random())
    print(f"stages {stages}: largest relative loss difference {found:.2g}")
    assert found < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("checkpointing", ["off", "all"])
def test_every_number_of_ranks_continues_from_every_other(
    digits: Path, tmp_path: Path, stage: int, checkpointing: str
) -> None:
    """1 → 4 → 2 → 3 at one stage."""
    assert _check_chain(digits, tmp_path, (stage,) * 4, (checkpointing,) * 4, seed=stage) < TOLERANCE
