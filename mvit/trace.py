"""A trace of what a run computes: every rank writes one JSON line a step, exact to the bit, for `mvit prove-resume`.

Of samples the keys and a digest of what the augmentation made of them; of numbers their bit patterns; of tensors their
fingerprints. Each line is flushed, so that a killed run keeps what it did. Two traces are compared in mvit/prove.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvit.engine import Engine
from mvit.fingerprint import fingerprint

Facts = Mapping[str, Mapping[str, Any]]
"""{kind: {name: value}}, everything JSON-able; equal facts mean equal bits."""
WEIGHTS, FROZEN, BUFFER = "weights", "frozen", "buffer"  # kinds beside the states of a fragment


@dataclass(frozen=True)
class Record:
    """What one rank held when an attempt started after `step`, or what it computed in `step`."""

    step: int
    facts: Facts
    replicated: frozenset[str] = frozenset()
    """Names of the parameters whose states every rank holds whole."""


@dataclass(frozen=True)
class RankTrace:
    """One attempt on one rank."""

    start: Record | None = None
    steps: Mapping[int, Record] = field(default_factory=dict)

    def after(self, step: int) -> Record | None:
        """Return the record that holds the state after `step`."""
        if self.start is not None and self.start.step == step:
            return self.start
        return self.steps.get(step)


@dataclass(frozen=True)
class Trace:
    """One attempt of a run on all its ranks, in rank order."""

    ranks: tuple[RankTrace, ...]

    @property
    def first_step(self) -> int | None:
        """The step after which the attempt started; None if it did not come that far on every rank."""
        starts = {None if rank.start is None else rank.start.step for rank in self.ranks}
        return starts.pop() if len(starts) == 1 else None

    @property
    def last_step(self) -> int:
        """The last step that every rank recorded; the first step's if none."""
        return min((max(rank.steps, default=self.first_step or 0) for rank in self.ranks), default=0)


def trace_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes its trace."""
    return folder / f"rank_{rank:05d}.jsonl"


class Tracer:
    """An `Observer` that records one attempt in `folder`, which must not hold a trace yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.step = 0
        """The last step recorded."""
        self._samples: dict[str, list[str]] = {}
        self._inputs: dict[str, list[str]] = {}

    def started(self, step: int, engine: Engine) -> None:
        """Record the state an attempt continues from."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = trace_file(self._folder, engine.ranks.rank).open("x")
        state = _state(engine)
        whole = sorted({f.name for f in engine.fragments() if f.replicated})
        self._write({"kind": "start", "step": step, "facts": state, "replicated": whole})

    def read(self, step: int, accumulation: int, batch: Any) -> None:
        """Remember the samples of a chunk."""
        chunk = f"chunk {accumulation}"
        self._samples[chunk], self._inputs[chunk] = list(batch.keys), sample_digests(batch)

    def updated(self, step: int, losses: Sequence[Tensor], grad_norm: Tensor, lr: float, engine: Engine) -> None:
        """Record a finished step; waits for the device."""
        facts = {
            "sample": self._samples,
            "input": self._inputs,
            "lr": {"learning rate": lr.hex()},
            "loss": {f"chunk {i}": float(loss).hex() for i, loss in enumerate(losses)},
            "grad_norm": {"gradient norm": float(grad_norm).hex()},
        }
        self._write({"kind": "step", "step": step, "facts": facts | _state(engine)})
        self._samples, self._inputs = {}, {}

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # the rest is the kernel's: it survives the kill of this process
        self.step = record["step"]


def read_trace(folder: Path, world_size: int) -> Trace:
    """Read what `Tracer` wrote on every rank; a last line that a kill cut off is left out."""
    return Trace(tuple(_read_rank(trace_file(folder, rank)) for rank in range(world_size)))


def _read_rank(file: Path) -> RankTrace:
    start, steps = None, {}
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
        record = Record(entry["step"], entry["facts"], frozenset(entry.get("replicated", ())))
        if entry["kind"] == "start":
            start = record
        else:
            steps[record.step] = record
    return RankTrace(start, steps)


def _state(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return the facts about the training state as this rank holds it."""
    facts: dict[str, dict[str, Any]] = {"rng": _rng(engine.ranks.device)}
    fragments = engine.fragments()
    facts["counter"] = _step_counts(engine) | {"skipped steps": engine.skipped_steps}
    facts["counter"] |= {f"loss scaler's {key}": value for key, value in engine.layout.loss_scaler().items()}
    facts["hyperparameter"] = {
        f"{key} of group {group['name']}": value
        for group in engine.hyperparameters()
        for key, value in group.items()
        if key != "name"
    }
    facts[BUFFER] = {name: _digest(buffer) for name, buffer in engine.buffers().items()}
    facts[FROZEN], facts[WEIGHTS] = {}, {}
    for f in fragments:
        for state, values in f.states.items():
            facts.setdefault(FROZEN if f.frozen else state, {})[f.name] = _hex(fingerprint(values, f.start))
        if engine.layout.stage == 3:
            facts[WEIGHTS][f.name] = _hex(fingerprint(f.weights, f.start))
    if engine.layout.stage < 3:  # every rank has all of them, also those whose masters another rank keeps
        for name, parameter in engine.module.named_parameters():
            facts[WEIGHTS][name] = _hex(fingerprint(parameter.detach().reshape(-1)))
    return facts


def _step_counts(engine: Engine) -> dict[str, list[int]]:
    """Return the distinct step counts per group: one each unless something is wrong."""
    layout, counts = engine.layout, {}
    for index, flat in layout.flats:
        group = layout.optimizer.param_groups[index]["name"]
        counts.setdefault(f"step count of group {group}", set()).add(int(layout.optimizer.state[flat]["step"]))
    return {name: sorted(values) for name, values in counts.items()}


def _rng(device: torch.device) -> dict[str, str]:
    found = {"cpu": _digest(torch.get_rng_state())}
    if device.type == "cuda":
        found["device"] = _digest(torch.cuda.get_rng_state(device))
    return found


def _hex(value: Tensor) -> str:
    return f"{int(value) % 2**64:016x}"


def sample_digests(batch: Any) -> list[str]:
    """Return one digest for each sample of a typed batch, over its part of every field.

    What is not one entry a sample is digested as a whole and stands at the end.
    """
    size = len(batch.keys)
    values = [getattr(batch, f.name) for f in fields(batch)] if is_dataclass(batch) else [batch]
    by_sample = [value for value in values if _length(value) == size]
    whole = [value for value in values if _length(value) != size]
    found = [_digest([value[i] for value in by_sample]) for i in range(size)]
    return [*found, _digest(whole)] if whole else found


def _length(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else -1
    return len(value) if isinstance(value, list | tuple) else -1


def _digest(value: Any) -> str:
    """Return 16 hexadecimal digits of a nest of tensors, arrays, sequences, mappings and plain values."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        _feed(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif is_dataclass(value):
        _feed(digest, [getattr(value, f.name) for f in fields(value)])
    elif isinstance(value, Mapping):
        _feed(digest, [(key, value[key]) for key in sorted(value)])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    else:
        digest.update(repr(value).encode())
