"""What the trainer and the evaluation ask of a task; they never ask which task it is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.loader import Transform
from mvit.results_file import Reports

Forward = Callable[..., Any]
"""A model, or an engine around one: inputs → outputs."""


class Metric(Protocol):
    """Sums over batches on the device; reduced over the ranks once, at the end."""

    def update(self, predictions: Any, batch: Any) -> None:
        """Add one batch; samples of weight 0 are padding and do not count."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the figures over all ranks (collective)."""
        ...


class TaskTransform(Transform, Protocol):
    """What turns a task's samples into examples, those to train on and those to predict."""

    def unlabelled(self, data: bytes) -> Any:
        """Turn an encoded picture or video of which nothing is known into one example as in the test.

        Raises DecodeError if it cannot be read.
        """
        ...


class Task(Protocol):
    """A problem to train for: its model, its data's treatment, its losses and its metric."""

    figure_of_merit: str
    """The metric's figure that says which checkpoint is the best; higher is better."""

    def build_model(self) -> nn.Module:
        """Build the model, initialised from torch's random state."""
        ...

    def load_weights(
        self, model: nn.Module, source: str | Path | Mapping[str, Tensor], *, new_head: bool = False
    ) -> str:
        """Load weights in any published naming into what `build_model` returned; returns a report.

        `new_head` lets a classifier of another number of classes start afresh instead of raising ValueError.
        """
        ...

    def flops_per_sample(self) -> float:
        """Return the floating-point operations that training on one sample takes, 0 where there is no such figure.

        Forward once, backward twice; recomputed activations are not useful work and do not count.
        """
        ...

    def transform(self, train: bool, *, all_views: bool = False) -> TaskTransform:
        """Return the function (members of one sample, seed) → one item for `collate`.

        `all_views`: the full test, which looks at a sample more than once where that is published.
        """
        ...

    def test_views(self) -> tuple[int, str]:
        """Return how often the full test looks at a sample, and in words what at."""
        ...

    def evaluation_samples(self, batch_size: int, *, all_views: bool = False) -> int:
        """Return how many samples make a batch of an evaluation that computes `batch_size` inputs at once."""
        ...

    def collate(self, items: Sequence[Any]) -> Any:
        """Put items together into a batch."""
        ...

    def losses(self, model: Forward, batch: Any, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Run the forward pass in training mode and return named scalar losses; their sum is minimised."""
        ...

    def predict(self, model: Forward, batch: Any, *, dtype: torch.dtype) -> Any:
        """Run the forward pass in evaluation mode."""
        ...

    def answer(self, model: nn.Module) -> Tensor:
        """Return what the model computes from a fixed random input, to compare two models that should be the same."""
        ...

    def metric(self, device: torch.device, reports: Reports | None = None) -> Metric:
        """Return an empty metric; rank 0's `compute` also writes the files that are asked for.

        Raises ConfigError for reports that the task has not.
        """
        ...

    def preview(self, batch: Any, *, seed: int, limit: int) -> Tensor:
        """Return up to `limit` inputs as the model sees them, (N, 3, H, W) in [0, 1]."""
        ...

    def show(self, predictions: Any, batch: Any, *, limit: int) -> Tensor | None:
        """Return up to `limit` pictures of what was predicted, (N, 3, H, W) in [0, 1]; None where figures say all."""
        ...
