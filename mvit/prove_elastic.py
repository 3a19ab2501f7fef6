"""Does a run continue as the same run on other ranks or at another ZeRO stage? Compares traces whose bits cannot agree.

Gradients are summed over ranks and buckets in another order there, so the losses drift apart by roundings. What does
not depend on that must still agree exactly: the samples of each global batch and what the augmentation made of them,
the learning rate, and the whole training state right after it was loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvit.fragments import ALL_MOMENTS, EMA, MASTER
from mvit.prove import Difference, Verdict, compared, first_difference, incomplete
from mvit.trace import Facts, Record, Trace

# Largest relative difference of a step's loss. Measured over 12 steps of a tiny model, 2 ranks at stage 2 -> 1 rank at
# stage 3: 5e-8 in fp32, 8e-4 in bf16; roundings grow with the steps, the learning rate and the size of the sums. fp16
# is between them: its rounding is an eighth of bf16's.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}
_WHOLE = (*ALL_MOMENTS, MASTER, EMA)
_SCALES = "loss scaler's "


@dataclass(frozen=True)
class _Step:
    """One step over all ranks, in the order of the stream."""

    samples: list[str]
    inputs: list[list[str]]
    lr: str
    loss: float


def compare_elastic(
    undisturbed: Trace, killed: Trace, resumed: Trace, steps: int, *, tolerance: float, error: str = ""
) -> Verdict:
    """Compare a run that was resumed on other ranks or at another stage with the run that was not disturbed.

    The killed attempt is as large as the undisturbed run and must agree with it bit by bit. `tolerance` bounds the
    relative difference of each step's loss after the resume.
    """
    difference = first_difference(undisturbed, killed, steps, resumed=False)
    error = error or incomplete(undisturbed, resumed, steps)
    start = resumed.first_step
    drift, note = None, ""
    if difference is None and start:
        difference = _state_difference(undisturbed, resumed, start)
    if difference is None and start:
        last = min(steps, resumed.last_step)
        pairs = [(s, _step(undisturbed, s), _step(resumed, s)) for s in range(start + 1, last + 1)]
        difference = next((found for pair in pairs if (found := _batch_difference(*pair))), None)
        if difference is None and pairs:
            drift, note = _drift(pairs)
    kept = drift is None or drift <= tolerance
    if not kept and difference is None:
        note = "the losses drift apart further than the order of summation explains: the state does not act as it did"
    samples, _ = compared(undisturbed, steps)
    tensors = sum(len(names) for kind, names in _whole(undisturbed, start or 0).items() if kind in _WHOLE)
    bad = difference or error or not kept
    verdict = "NOT EQUIVALENT" if bad else "EQUIVALENT"
    return Verdict(
        verdict,
        steps,
        samples,
        tensors,
        killed.last_step + 1,
        start,
        difference,
        error,
        drift,
        tolerance,
        note,
    )


def _drift(pairs: Sequence[tuple[int, _Step, _Step]]) -> tuple[float | None, str]:
    """Return the largest relative difference of a loss, None with the reason where none can be stated."""
    _, ours, theirs = pairs[0]
    if len(ours.inputs[0]) != len(theirs.inputs[0]):
        return None, (
            "losses were not compared: mixup, drop path and dropout are drawn per micro-batch, and its size changed"
        )
    # not max(), which passes over NaN
    differences = sorted((abs(b.loss - a.loss) / max(abs(a.loss), 1e-12) for _, a, b in pairs), key=_nan_last)
    return differences[-1], ""


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _state_difference(undisturbed: Trace, resumed: Trace, step: int) -> Difference | None:
    """Compare the whole state an attempt continues from, whoever holds which part of it."""
    wanted, got = _whole(undisturbed, step), _whole(resumed, step)
    for kind in ("counter", "hyperparameter", *_WHOLE):
        ours, theirs = wanted.get(kind, {}), got.get(kind, {})
        wrong = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if kind == "counter":  # a stage or precision without a loss scale has none to restore
            wrong = [name for name in wrong if not (name.startswith(_SCALES) and not (name in ours and name in theirs))]
        if wrong:
            name = min(wrong)
            cause = "what was loaded on the other ranks is not what was saved"
            values = (ours.get(name), theirs.get(name))
            return Difference(step, True, None, kind, name, *values, len(wrong) - 1, cause)
    return None


def _whole(trace: Trace, step: int) -> Facts:
    """Put the ranks' parts of the state after `step` together: fingerprints of disjoint ranges add up."""
    records = [record for rank in trace.ranks if (record := rank.after(step)) is not None]
    starts = [rank.start for rank in trace.ranks if rank.start is not None]
    if not records or not starts:
        return {}
    whole: dict[str, dict[str, Any]] = {key: dict(records[0].facts[key]) for key in ("counter", "hyperparameter")}
    for kind in _WHOLE:
        names = dict.fromkeys(name for record in records for name in record.facts.get(kind, {}))
        whole[kind] = {name: _sum(kind, name, records, name in starts[0].replicated) for name in names}
    return whole


def _sum(kind: str, name: str, records: Sequence[Record], replicated: bool) -> str:
    parts = [int(record.facts[kind][name], 16) for record in records if name in record.facts.get(kind, {})]
    return f"{(parts[0] if replicated else sum(parts)) % 2**64:016x}"


def _step(trace: Trace, step: int) -> _Step:
    """Put a step's chunks into the order of the stream: accumulation by accumulation, rank by rank."""
    records = [rank.steps[step] for rank in trace.ranks]
    chunks = [(record.facts, chunk) for chunk in records[0].facts["sample"] for record in records]
    losses = [float.fromhex(facts["loss"][chunk]) for facts, chunk in chunks]
    return _Step(
        samples=[key for facts, chunk in chunks for key in facts["sample"][chunk]],
        inputs=[list(facts["input"][chunk]) for facts, chunk in chunks],
        lr=records[0].facts["lr"]["learning rate"],
        loss=sum(losses) / len(losses),
    )


def _batch_difference(step: int, ours: _Step, theirs: _Step) -> Difference | None:
    if ours.samples != theirs.samples:
        at, a, b = _first(ours.samples, theirs.samples)
        cause = "the global batch is not made of the same samples in the same order"
        return Difference(step, False, None, "sample", f"sample {at} of the global batch", a, b, 0, cause)
    if ours.inputs != theirs.inputs and len(ours.inputs[0]) == len(theirs.inputs[0]):
        at, a, b = _first(*([one for chunk in s.inputs for one in chunk] for s in (ours, theirs)))
        cause = "the same samples, augmented otherwise: augmentation must not depend on rank or worker"
        return Difference(step, False, None, "input", f"sample {at} of the global batch", a, b, 0, cause)
    if ours.lr != theirs.lr:
        cause = "the schedule was computed from other numbers, or is off by some steps"
        return Difference(step, False, None, "lr", "learning rate", ours.lr, theirs.lr, 0, cause)
    return None


def _first(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, str | None, str | None]:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    first, second = (part[at] if at < len(part) else None for part in (ours, theirs))
    return at, first, second
