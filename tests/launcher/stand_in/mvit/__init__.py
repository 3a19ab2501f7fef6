"""Stands in for the real package in the launcher's tests: counts instead of training, so that a job takes a second."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from mvit.life import Stopped

CODE = "as submitted"


@dataclass(frozen=True)
class Recipe:
    """What the stand-in does: so many steps of so many seconds, and one fault."""

    name: str
    output_dir: str
    steps: int = 5
    step_s: float = 0.05
    save_every: int = 2
    global_batch_size: int = 8
    raise_at: int = -1
    raise_on_rank: int = 0
    num_workers: int = 0
    shards: str | None = "shards"
    validation: str | None = None
    evaluate_s: float = 0.0
    weights: str | None = None
    num_classes: int = 10

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(train=self.shards, validation=self.validation)

    @property
    def model(self) -> SimpleNamespace:
        return SimpleNamespace(weights=self.weights, num_classes=self.num_classes)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self))

    def batch_arithmetic(self, world_size: int) -> str:
        if self.global_batch_size % world_size:
            raise ValueError(f"global_batch_size={self.global_batch_size} does not divide by {world_size} ranks")
        return f"{self.global_batch_size // world_size} samples x {world_size} ranks = {self.global_batch_size}"


@dataclass(frozen=True)
class TrainResult:
    step: int
    total_steps: int
    stopped: bool
    metrics: dict[str, float] = field(default_factory=dict)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    values = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        key, _, value = override.partition("=")
        values[key.removeprefix("model.")] = yaml.safe_load(value)
    return Recipe(**values)


def train(
    config: Recipe,
    *,
    run_dir: Path,
    stop_requested: Callable[[], bool],
    show_progress: bool = True,
    observer: Any = None,
    life: Any = None,
) -> TrainResult:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    facts = {
        key: os.environ.get(key)
        for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    }
    workers = _start_workers(config.num_workers)
    facts |= {"pid": os.getpid(), "workers": [worker.pid for worker in workers], "code": CODE, "file": __file__}
    facts |= {"cwd": os.getcwd(), "weights": config.weights}
    if config.weights is not None:
        assert list(Path(config.weights).glob("checkpoints/step_*")), "it starts before its weights are there"
    step = max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")), default=0)
    _append(run_dir / f"facts_{rank}.jsonl", facts | {"first_step": step})
    while not all(_has_arrived(run_dir / f"facts_{peer}.jsonl", facts) for peer in range(world_size)):
        time.sleep(0.01)
    print(f"rank {rank} of {world_size} trains from step {step}", flush=True)
    while step < config.steps:
        step += 1
        life.beat(step, "data")
        life.beat(step, "compute")
        if observer is not None:
            observer.read(step, 0, None)
        time.sleep(config.step_s)
        if step == config.raise_at and rank == config.raise_on_rank:
            raise ArithmeticError(f"the fault at step {step}")
        stop = _all_stop(run_dir, facts, stop_requested(), world_size)
        if rank == 0:
            record = {"kind": "train", "step": step, "total_steps": config.steps, "time": time.time()}
            _append(
                run_dir / "metrics.jsonl", record | {"loss": 1 / step, "lr": 1e-3, "samples_per_s": 9.0, "eta_s": 1.0}
            )
            if stop or step % config.save_every == 0 or step == config.steps:
                life.check_owner()
                (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        if stop:
            break
    else:
        if rank == 0:
            record = {"kind": "evaluate", "step": step, "time": time.time(), "top1": 0.75}
            _append(run_dir / "metrics.jsonl", record)
    _leave_together(run_dir, facts, rank, world_size)
    for worker in workers:
        worker.terminate()
    return TrainResult(step, config.steps, stopped=step < config.steps, metrics={"top1": 0.75})


def evaluate(
    config: Recipe,
    weights: Path,
    *,
    ema: bool,
    show_progress: bool,
    beat: Callable[[], None],
    stop_requested: Callable[[], bool],
) -> dict[str, float]:
    beat()
    _append(weights.parent.parent / "evaluated.jsonl", {"weights": str(weights), "ema": ema, "name": config.name})
    end = time.monotonic() + config.evaluate_s
    while time.monotonic() < end:
        beat()
        if stop_requested():
            raise Stopped("the evaluation was asked to stop")
        time.sleep(0.05)
    return {"top1": 0.75, "samples": 100.0}


def _has_arrived(path: Path, facts: dict) -> bool:
    """Tell whether a peer has come to the same rendezvous, as `init_process_group` would wait for."""
    lines = path.read_text().splitlines() if path.exists() else []
    return bool(lines) and json.loads(lines[-1])["MASTER_PORT"] == facts["MASTER_PORT"]


def _all_stop(run_dir: Path, facts: dict, asked: bool, world_size: int) -> bool:
    """Stop if any rank is asked to, as the ranks agree to do."""
    mark = run_dir / f".stop_{facts['MASTER_PORT']}"
    if asked:
        mark.touch()
    return asked or (world_size > 1 and mark.exists())


def _leave_together(run_dir: Path, facts: dict, rank: int, world_size: int) -> None:
    """Wait for all ranks, as the last save does: alone, none leaves as if all were saved."""
    marks = [run_dir / f".left_{facts['MASTER_PORT']}_{peer}" for peer in range(world_size)]
    marks[rank].touch()
    while not all(mark.exists() for mark in marks):
        time.sleep(0.01)


def _start_workers(number: int) -> list[Any]:
    workers = [multiprocessing.get_context("fork").Process(target=_work, args=(os.getpid(),)) for _ in range(number)]
    for worker in workers:
        worker.start()
    return workers


def _work(parent: int) -> None:
    """Do nothing until the rank is gone, for which a worker of torch's DataLoader looks every 5 s, too."""
    while os.getppid() == parent:
        time.sleep(5)


def _append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
