"""What a training process tells the launcher that started it, and asks it: signs of life, ownership, the ledger."""

from collections.abc import Mapping
from typing import Literal, Protocol

Phase = Literal["start", "data", "compute", "log", "evaluate", "save", "end"]
"""What a rank is doing: everything before the first step, waiting for a batch, the step itself, reporting, evaluating
(a beat at every batch and reduction), saving at a stop or at the end, leaving. The step that a beat names has begun in
`data` and `compute` and is finished in the others."""


class Superseded(RuntimeError):
    """A later life of the same run has taken over: this one must not write any more."""


class Stopped(RuntimeError):
    """What was asked to stop has left before its end, and has nothing to save."""


class Life(Protocol):
    """One life of a run, from the launcher's start of its ranks to their end."""

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank is alive and begins `phase` of `step`; costs a microsecond, called on every rank."""
        ...

    def check_owner(self) -> None:
        """Raise Superseded if a later life has taken the run over; rank 0 asks before it publishes or removes."""
        ...

    def record(self, event: str, facts: Mapping[str, object]) -> None:
        """Append an event to the run's ledger (rank 0)."""
        ...

    def goodput(self) -> Mapping[str, float]:
        """Return what the ledger says about all lives so far, for TensorBoard (rank 0); empty without a ledger."""
        ...


class Unattended:
    """The life of a process that no launcher watches."""

    def beat(self, step: int, phase: Phase) -> None:
        """Do nothing."""

    def check_owner(self) -> None:
        """Do nothing: nobody else can have started."""

    def record(self, event: str, facts: Mapping[str, object]) -> None:
        """Do nothing."""

    def goodput(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}
