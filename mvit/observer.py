"""Who watches a run from within: what `mvit prove-resume` compares runs by."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from mvit.engine import Engine


class Observer(Protocol):
    """Sees what a run computes, on every rank and without changing it; `mvit prove-resume` compares runs this way."""

    def started(self, step: int, engine: Engine) -> None:
        """The attempt is about to continue after `step`; everything is restored (collective)."""
        ...

    def read(self, step: int, accumulation: int, batch: Any) -> None:
        """This rank is about to compute `batch` as a chunk of `step`."""
        ...

    def updated(self, step: int, losses: Sequence[Tensor], grad_norm: Tensor, lr: float, engine: Engine) -> None:
        """The weights are updated; `losses` of this rank's chunks (collective)."""
        ...
