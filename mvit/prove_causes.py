"""What most likely made a resumed run differ: the first difference of two traces, read as a diagnosis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mvit.fragments import ALL_MOMENTS, EMA, MASTER
from mvit.trace import BUFFER, FROZEN, WEIGHTS, RankTrace, Record

BEFORE_THE_KILL = (
    "the second run differs before it was killed, so resuming is not to blame: an operation is not deterministic on "
    "this device, the data have changed meanwhile, or saving changes what is trained"
)
_STATES = (MASTER, *ALL_MOMENTS, EMA)
_ZERO = "0" * 16


@dataclass(frozen=True)
class _Case:
    """One difference with what surrounds it; `wanted` and `got` are the records of the same moment and rank."""

    kind: str
    name: str
    at_start: bool
    undisturbed: RankTrace
    wanted: Record
    got: Record

    @property
    def step(self) -> int:
        return self.wanted.step

    @property
    def ours(self) -> Any:
        return self.wanted.facts.get(self.kind, {}).get(self.name)

    @property
    def theirs(self) -> Any:
        return self.got.facts.get(self.kind, {}).get(self.name)

    def same(self, kind: str) -> bool:
        """Say whether another kind of the same name agrees."""
        ours, theirs = (record.facts.get(kind, {}).get(self.name) for record in (self.wanted, self.got))
        return ours is not None and ours == theirs

    def shifted(self) -> int | None:
        """Return by how many steps the undisturbed run is away from where it has what was got here."""
        theirs = self.got.facts.get(self.kind)
        steps = sorted(self.undisturbed.steps, key=lambda step: abs(step - self.step))
        found = (s - self.step for s in steps if self.undisturbed.steps[s].facts.get(self.kind) == theirs)
        return next((shift for shift in found if shift), None)


def likely_cause(kind: str, name: str, at_start: bool, undisturbed: RankTrace, wanted: Record, got: Record) -> str:
    """Return one line for the user; everything that comes before `kind` in causal order is known to agree."""
    case = _Case(kind, name, at_start, undisturbed, wanted, got)
    return _BY_KIND.get(kind, _unknown)(case)


def _unknown(case: _Case) -> str:
    return "unknown; please report it with this message"


def _sample(case: _Case) -> str:
    shift = case.shifted()
    if shift is not None:
        return (
            f"these are the samples of step {case.step + shift}: the data cursor is {_off(shift)} "
            "(does it count what was prefetched?)"
        )
    ours, theirs = ([key for keys in r.facts.get("sample", {}).values() for key in keys] for r in _both(case))
    if sorted(ours) == sorted(theirs):
        return "the same samples in another order within the step"
    return "the samples come in another order: another seed, shuffle window or list of shards"


def _input(case: _Case) -> str:
    return (
        "the same samples, augmented otherwise: their augmentation must be seeded by (seed, epoch, sample), not by "
        "worker, process or attempt"
    )


def _rng(case: _Case) -> str:
    if case.at_start:
        return "the random state was not restored"
    return "drop path, dropout or mixup of this step were seeded otherwise, by a counter that began again for one"


def _lr(case: _Case) -> str:
    shift = case.shifted()
    if shift is not None:
        return f"the learning-rate schedule is {_off(shift)}"
    return "the schedule was computed from other numbers: total steps, warm-up, peak rate or batch size"


def _loss(case: _Case) -> str:
    return (
        "the same samples, weights and random state gave another loss: the seed of mixup, or an operation that is not "
        "deterministic on this device"
    )


def _grad_norm(case: _Case) -> str:
    return "the same losses gave other gradients: an operation of the backward pass is not deterministic on this device"


def _counter(case: _Case) -> str:
    if not case.name.startswith("step count"):
        return "it was not restored"
    if case.at_start:
        return "Adam's step count was not restored; its bias correction depends on it"
    return "Adam's step count did not advance by one: is one step tensor shared by several flat buffers?"


def _hyperparameter(case: _Case) -> str:
    key, _, group = case.name.partition(" of group ")
    same = [
        name.partition(" of group ")[2]
        for name, value in case.wanted.facts[case.kind].items()
        if name.startswith(f"{key} of group ") and value == case.theirs and not name.endswith(f" of group {group}")
    ]
    if same:
        return f"this is the value of group {same[0]}: one group's settings were put over another's"
    return "the group's settings were not restored, or the recipe has changed"


def _moment(case: _Case) -> str:
    if case.at_start:
        return _misplaced(case)
    return (
        "the same losses and gradient norm gave other moments: gradient clipping or the optimizer's betas have changed"
    )


def _master(case: _Case) -> str:
    if not case.at_start:
        return "the same moments and rate gave other weights: Adam's eps, weight decay or step count have changed"
    masters, theirs = (record.facts.get(MASTER, {}) for record in _both(case))
    if case.same(WEIGHTS) and sum(value != theirs.get(name) for name, value in masters.items()) > len(masters) / 2:
        return "the masters were rounded to the precision of the forward pass, whose weights agree"
    return _misplaced(case)


def _weights(case: _Case) -> str:
    moment = "loaded" if case.at_start else "updated"
    return f"the masters agree: the forward pass does not use the weights that were {moment}"


def _ema(case: _Case) -> str:
    if case.at_start:
        return _misplaced(case)
    return "the weights agree, their average does not: optim.ema_decay has changed"


def _misplaced(case: _Case) -> str:
    """Look for the state whose value stands here."""
    if case.theirs == _ZERO:
        return "it is zero: it was not restored"
    here = {state: case.wanted.facts.get(state, {}).get(case.name) for state in _STATES}
    holds = next((state for state, value in here.items() if value == case.theirs), None)
    if holds == MASTER and case.kind == EMA:
        return "it was not restored: the average began again at the weights"
    if holds is not None:
        return f"it holds what belongs to {holds}: two states were exchanged, or one was loaded twice"
    return "what was loaded is not what was saved: elements of another place or rank, or of another precision"


def _not_restored(case: _Case) -> str:
    return "it was not restored" if case.at_start else "it has changed otherwise in this step"


def _both(case: _Case) -> tuple[Record, Record]:
    return case.wanted, case.got


def _off(shift: int) -> str:
    steps = "one step" if abs(shift) == 1 else f"{abs(shift)} steps"
    return f"off by {steps} ({'ahead' if shift > 0 else 'behind'})"


_BY_KIND: Mapping[str, Callable[[_Case], str]] = {
    "sample": _sample,
    "input": _input,
    "rng": _rng,
    "lr": _lr,
    "loss": _loss,
    "grad_norm": _grad_norm,
    "counter": _counter,
    "hyperparameter": _hyperparameter,
    BUFFER: _not_restored,
    FROZEN: _not_restored,
    **dict.fromkeys(ALL_MOMENTS, _moment),
    MASTER: _master,
    WEIGHTS: _weights,
    EMA: _ema,
}
