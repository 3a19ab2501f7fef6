"""Measure checkpoints: what a save costs training, beside DeepSpeed's own save of the same state; loading, memory.

Everything is synced to disk before a clock stops. One process, or each rank under torchrun.
"""

import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from mvit import distributed
from mvit.checkpoint import read_manifest
from mvit.checkpoint_load import check_loaded, load_into
from mvit.checkpoint_save import Contents, Saver
from mvit.config import ModelConfig
from mvit.distributed import RankInfo, gather_objects, together
from mvit.engine import Engine
from mvit.optim import OptimConfig, parameter_groups
from mvit.retention import Retention
from mvit.variants import create_model
from mvit.zero import Precision, ZeroConfig

PEERS = ("deepspeed",)
_SIZE = (224, 224)


@dataclass(frozen=True)
class CheckpointRow:
    """One operation: medians over the rounds, on the slowest rank."""

    what: str
    stall_s: float
    """How long training waits."""
    total_s: float
    """Until everything is on disk under its final name, or until the state is loaded."""
    first_stall_s: float
    """The same in the first round, which also has to get the memory."""
    gib: float
    """Written or read, over all ranks."""
    extra_gib: float
    """Resident memory above the training state, on the rank with most."""
    stall_s_per_gb: float
    stall_ratio: float | None
    """Stall over that of DeepSpeed's save; None without that peer."""


def bench_checkpoint(
    variant: str = "mvitv2_tiny",
    *,
    zero_stage: Literal[0, 1, 2, 3] = 1,
    precision: Precision = "bf16",
    ema: bool = False,
    against: Sequence[str] = PEERS,
    rounds: int = 3,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Save and load the full training state of a variant; returns JSON-able rows, the same on every rank (collective).

    The operations take turns in each round. The disk must hold three checkpoints. Raises ValueError for an unknown
    variant or peer.
    """
    for peer in against:
        if peer not in PEERS:
            raise ValueError(f"cannot bench against {peer!r}; choose from {list(PEERS)}")
    ModelConfig(variant=variant)  # names the variants if this is none
    ranks = distributed.start()
    made = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder) if ranks.is_main else None
    root = Path(distributed.broadcast_object(made))
    try:
        bench = _Bench(variant, zero_stage, precision, ema, ranks, root)
        for _ in range(rounds):
            bench.save("save beside training", asynchronous=True)
            bench.save("save and wait", asynchronous=False)
            if "deepspeed" in against:
                bench.save_by_deepspeed("DeepSpeed save_checkpoint + fsync")
            bench.load("load", "prove the loaded state")
        rows = bench.rows()
        bench.close()
    finally:
        if ranks.is_main:
            shutil.rmtree(root, ignore_errors=True)
    return [asdict(row) for row in rows]


class _Bench:
    def __init__(
        self,
        variant: str,
        stage: Literal[0, 1, 2, 3],
        precision: Precision,
        ema: bool,
        ranks: RankInfo,
        root: Path,
    ) -> None:
        self._ranks, self._root = ranks, root
        self._samples: dict[str, list[tuple[float, float, float, float]]] = {}  # stall, total, gib, extra gib
        torch.manual_seed(0)
        model = create_model(variant, input_size=_SIZE)
        optim = OptimConfig(ema_decay=0.9999 if ema else None)
        self._shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        self._engine = Engine(
            model,
            parameter_groups(model, optim, depth=len(model.blocks)),
            optim,
            ZeroConfig(stage=stage),
            precision=precision,
            micro_batch_size=1,
            accumulation_steps=1,
            ranks=ranks,
        )
        self._savers = {
            asynchronous: Saver(root / str(asynchronous), ranks, Retention(keep_last=1), asynchronous=asynchronous)
            for asynchronous in (True, False)
        }
        self._step = 0
        self._savers[True].reserve(self._engine.fragments())  # as a run does when it starts
        gc.collect()

    def save(self, what: str, *, asynchronous: bool) -> None:
        self._step += 1
        saver, engine = self._savers[asynchronous], self._engine
        distributed.barrier()
        with _peak_memory() as extra:
            began = time.perf_counter()
            state = {"counters": engine.counters()}
            saver.begin(
                self._step,
                Contents(engine.fragments(), self._shapes, engine.hyperparameters(), state),
                read_back=False,
            )
            stall = time.perf_counter() - began
            (outcome,) = saver.finish()
            total = time.perf_counter() - began
        assert not outcome.error, outcome.error
        self._note(what, stall, total, outcome.num_bytes / 2**30, extra())

    def save_by_deepspeed(self, what: str) -> None:
        folder = self._root / "deepspeed"
        distributed.barrier()
        with _peak_memory() as extra:
            began = time.perf_counter()
            self._engine.save_by_deepspeed(folder)
            if self._ranks.is_main:
                for file in folder.rglob("*"):
                    if file.is_file():
                        with open(file, "rb") as handle:
                            os.fsync(handle.fileno())
            distributed.barrier()
            stall = time.perf_counter() - began
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        distributed.barrier()
        if self._ranks.is_main:
            shutil.rmtree(folder)
        self._note(what, stall, stall, size / 2**30, extra())

    def load(self, what: str, proof: str) -> None:
        manifest = read_manifest(self._savers[False].run_dir / "checkpoints" / f"step_{self._step:08d}")
        distributed.barrier()
        with _peak_memory() as extra:
            began = time.perf_counter()
            with self._engine.writing() as fragments:
                together(lambda: load_into(manifest, fragments, self._shapes), "loading")
            loaded = time.perf_counter() - began
        self._note(what, loaded, loaded, manifest.num_bytes / 2**30, extra())
        with _peak_memory() as extra:
            began = time.perf_counter()
            check_loaded(manifest, self._engine.fragments(), self._engine.hyperparameters(), self._ranks)
            proven = time.perf_counter() - began
        self._note(proof, proven, proven, manifest.num_bytes / 2**30, extra())

    def _note(self, what: str, *sample: float) -> None:
        stall, total, gib, extra = (max(values) for values in zip(*gather_objects(sample), strict=True))
        self._samples.setdefault(what, []).append((stall, total, gib, extra))

    def rows(self) -> list[CheckpointRow]:
        """Return the medians; ratios to DeepSpeed's stall are for saves."""
        peer = next((s for what, s in self._samples.items() if what.startswith("DeepSpeed")), None)
        peer_stall = statistics.median(stall for stall, *_ in peer) if peer else None
        found = []
        for what, samples in self._samples.items():
            stall, total, gib, _ = (statistics.median(column) for column in zip(*samples, strict=True))
            is_save = what.startswith(("save", "DeepSpeed"))
            found.append(
                CheckpointRow(
                    what,
                    stall,
                    total,
                    samples[0][0],
                    gib,
                    max(extra for *_, extra in samples),
                    stall / (gib * 2**30 / 1e9),
                    stall / peer_stall if peer_stall and is_save else None,
                )
            )
        return found

    def close(self) -> None:
        for saver in self._savers.values():
            saver.close()
        self._engine.close()


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Sample this process's resident memory in a thread; gives a function: by how many GiB it grew at its peak."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: (peak - before) / 2**30
    finally:
        done.set()
        watcher.join()
        peak = max(peak, process.memory_info().rss)
