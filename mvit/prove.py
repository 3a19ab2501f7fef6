"""Is a run that was killed and resumed the run that was never disturbed? Compares their traces; pure functions.

The comparison goes step by step in causal order, so that what is named first is the cause and not its consequences.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mvit.fragments import ALL_MOMENTS, EMA, MASTER
from mvit.prove_causes import BEFORE_THE_KILL, likely_cause
from mvit.trace import BUFFER, FROZEN, WEIGHTS, RankTrace, Record, Trace

_OF_A_STEP = ("sample", "input", "lr", "loss", "grad_norm")  # what a start has not
CAUSAL_ORDER = (
    *("sample", "input", "rng", "lr", "loss", "grad_norm"),
    *("counter", "hyperparameter", BUFFER, FROZEN, *ALL_MOMENTS, MASTER, WEIGHTS, EMA),
)
TENSORS = (BUFFER, FROZEN, *ALL_MOMENTS, MASTER, WEIGHTS, EMA)
_TITLES = {
    "sample": "sample key",
    "input": "augmented sample",
    "rng": "torch's random state",
    "lr": "lr",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "counter": "counter",
    "hyperparameter": "hyperparameter",
    BUFFER: "buffer",
    FROZEN: "frozen weights",
    MASTER: "fp32 master",
    WEIGHTS: "weights of the forward pass",
    EMA: "moving average (ema)",
}
VerdictName = Literal["BIT-IDENTICAL", "NOT IDENTICAL", "EQUIVALENT", "NOT EQUIVALENT"]


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as in the undisturbed run."""

    step: int
    """The step it was found in, or after which the attempt started."""
    at_start: bool
    """Whether it was there right after the attempt started, before it trained."""
    rank: int | None
    """None if it belongs to all ranks."""
    kind: str
    """One of `CAUSAL_ORDER`."""
    name: str
    """Tensor, group, chunk …"""
    wanted: Any
    got: Any
    num_others: int = 0
    """Further entries of this kind that differ on this rank at this moment."""
    likely_cause: str = ""

    def __str__(self) -> str:
        when = f"right after starting from step {self.step}" if self.at_start else f"step {self.step}"
        where = "" if self.rank is None else f", rank {self.rank}"
        more = f" (and {self.num_others} more of this kind)" if self.num_others else ""
        return (
            f"first difference: {when}{where}: {_TITLES.get(self.kind, self.kind)}: {self.name}{more}\n"
            f"  wanted        {_shown(self.wanted)}\n"
            f"  got           {_shown(self.got)}\n"
            f"  likely cause  {self.likely_cause}"
        )


@dataclass(frozen=True)
class Verdict:
    """What the comparison came to."""

    verdict: VerdictName
    steps: int
    """Steps of the undisturbed run that were compared."""
    num_samples: int
    num_tensors: int
    """Tensors compared after every step, over all kinds of state."""
    killed_at: int
    resumed_from: int | None
    difference: Difference | None = None
    error: str = ""
    """What the resumed run failed with, or why it proves nothing."""
    loss_difference: float | None = None
    """Largest relative difference of a step's loss, where bits are not expected to agree."""
    tolerance: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict in ("BIT-IDENTICAL", "EQUIVALENT")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        told = [
            f"{self.steps} steps, {self.num_samples} samples, {self.num_tensors} tensors",
            f"killed at step {self.killed_at}, resumed from step {self.resumed_from}",
        ]
        if self.loss_difference is not None:
            bound = "" if self.tolerance is None else f" (tolerance {self.tolerance:g})"
            told.append(f"largest relative difference of a loss {self.loss_difference:.1e}{bound}")
        lines = [f"{self.verdict}: {'; '.join(told)}"]
        lines += [str(part) for part in (self.difference, self.error, self.note) if part]
        return "\n".join(lines)


def compare(undisturbed: Trace, killed: Trace, resumed: Trace, steps: int, error: str = "") -> Verdict:
    """Compare a killed and a resumed attempt, bit by bit, with the run that was not disturbed.

    `resumed` must reach `steps`, unless `error` tells why it did not. Where an attempt started is compared with the
    undisturbed run's state after that step.
    """
    difference = first_difference(undisturbed, killed, steps, resumed=False)
    if difference is None:
        difference = first_difference(undisturbed, resumed, steps, resumed=True)
    error = error or incomplete(undisturbed, resumed, steps)
    return Verdict(
        "NOT IDENTICAL" if difference or error else "BIT-IDENTICAL",
        steps,
        *compared(undisturbed, steps),
        killed.last_step + 1,
        resumed.first_step,
        difference,
        error,
    )


def incomplete(undisturbed: Trace, resumed: Trace, steps: int) -> str:
    """Say why two traces prove nothing about `steps` steps; empty if they do."""
    if undisturbed.last_step < steps:
        return f"the undisturbed run ended after step {undisturbed.last_step}"
    if resumed.first_step is None:
        return "the resumed run did not start on every rank, or not at the same step"
    if resumed.first_step == 0:
        return "the second attempt began at step 0: it found no checkpoint, so nothing was resumed"
    if resumed.first_step >= steps:
        return f"the second attempt began after step {resumed.first_step}: nothing is left to compare"
    if resumed.last_step < steps:
        return f"the resumed run ended after step {resumed.last_step}, without an error"
    return ""


def compared(trace: Trace, steps: int) -> tuple[int, int]:
    """Count the samples up to `steps`, and the tensors of one step over all kinds of state."""
    records = [rank.steps[step] for rank in trace.ranks for step in range(1, steps + 1) if step in rank.steps]
    samples = sum(len(keys) for record in records for keys in record.facts["sample"].values())
    last = [record.facts for record in records if record.step == steps]
    tensors = {(kind, name) for facts in last for kind in TENSORS for name in facts.get(kind, ())}
    return samples, len(tensors)


def first_difference(wanted: Trace, got: Trace, steps: int, *, resumed: bool) -> Difference | None:
    """Return the first difference of one attempt from the undisturbed run, None if there is none in what it did."""
    if len(wanted.ranks) != len(got.ranks):
        raise ValueError(f"the traces are of {len(wanted.ranks)} and {len(got.ranks)} ranks; compare equal numbers")
    for step, at_start, records in _moments(wanted, got, steps):
        kinds = {kind for pair in records for record in pair for kind in record.facts}
        order = [*CAUSAL_ORDER, *sorted(kinds - set(CAUSAL_ORDER))]
        for kind in order:
            if at_start and kind in _OF_A_STEP:
                continue
            for rank, (ours, theirs) in enumerate(records):
                found = _differing(ours.facts.get(kind, {}), theirs.facts.get(kind, {}))
                if found:
                    name = found[0]
                    cause = likely_cause(kind, name, at_start, wanted.ranks[rank], ours, theirs)
                    place = _placed(name, ours.facts.get(kind, {}).get(name), theirs.facts.get(kind, {}).get(name))
                    cause = cause if resumed else BEFORE_THE_KILL
                    return Difference(step, at_start, rank, kind, *place, len(found) - 1, cause)
    return None


def _moments(wanted: Trace, got: Trace, steps: int) -> Iterator[tuple[int, bool, list[tuple[Record, Record]]]]:
    """Yield (step, whether it is the start, the records of each rank) of everything both have on all ranks."""
    start = got.first_step
    if start is None:
        return
    pairs = [(ours.after(start), theirs.start) for ours, theirs in _zip(wanted, got)]
    yield from _complete(start, True, pairs)
    for step in range(start + 1, steps + 1):
        yield from _complete(step, False, [(a.steps.get(step), b.steps.get(step)) for a, b in _zip(wanted, got)])


def _zip(wanted: Trace, got: Trace) -> Iterator[tuple[RankTrace, RankTrace]]:
    return zip(wanted.ranks, got.ranks, strict=True)


def _complete(
    step: int, at_start: bool, pairs: Sequence[tuple[Record | None, Record | None]]
) -> Iterator[tuple[int, bool, list[tuple[Record, Record]]]]:
    found = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(found) == len(pairs):
        yield step, at_start, found


def _differing(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """List the names whose values differ or are on one side only, in the undisturbed run's order."""
    names = [*wanted, *(name for name in got if name not in wanted)]
    return [name for name in names if name not in wanted or name not in got or wanted[name] != got[name]]


def _placed(name: str, wanted: Any, got: Any) -> tuple[str, Any, Any]:
    """Return (name, wanted, got) of the first entry that differs, if both values are lists of one length."""
    lists = isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got) > 1
    if not lists or name.startswith(("betas", "parameters", "step count")):
        return name, wanted, got
    at = next(i for i, (ours, theirs) in enumerate(zip(wanted, got, strict=True)) if ours != theirs)
    return f"{name}, sample {at}", wanted[at], got[at]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str) and "0x" in value and "p" in value:
        return f"{float.fromhex(value):.9g} ({value})"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
