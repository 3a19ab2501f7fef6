"""What classifying images and clips have in common: the model, its loss, and the accuracies."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import ImageBatch, VideoBatch
from mvit.class_names import class_names
from mvit.config import RunConfig
from mvit.distributed import sum_over_ranks
from mvit.given_labels import GivenLabels
from mvit.metrics import forward_flops
from mvit.model.backbone import MViT
from mvit.results_file import Reports
from mvit.tasks.class_results import ClassResults
from mvit.variants import create_model
from mvit.weights import load_weights


def build_classifier(config: RunConfig) -> MViT:
    """Build the model of a recipe, for images or clips, initialised from torch's random state."""
    model = config.model
    built = create_model(
        model.resolved_variant(),
        num_classes=model.num_classes,
        input_size=config.input_size,
        class_token=model.class_token,
        expand=model.expand,
        drop_path=model.drop_path,
        absolute_positions=model.absolute_positions,
        relative_positions=model.relative_positions,
        residual_pooling=model.residual_pooling,
        head_dropout=model.head_dropout,
        attention_form=model.attention_form,
        drop_path_mode=model.drop_path_mode,
    )
    built.set_activation_checkpointing(config.train.checkpointed_stages)
    return built


def training_flops(config: RunConfig) -> float:
    """Return the floating-point operations of one sample's forward and backward pass."""
    with torch.device("meta"):
        return 3 * forward_flops(build_classifier(config), (1, 3, *config.input_size))


def logits_of_noise(model: nn.Module, config: RunConfig) -> Tensor:
    """Return the logits (1, K) of a fixed random input."""
    return model(torch.randn(1, 3, *config.input_size, generator=torch.Generator().manual_seed(0)))


def load_classifier(model: nn.Module, source: str | Path | Any, config: RunConfig, *, new_head: bool) -> str:
    """Load weights in any published naming, those of images into a model of clips as the recipe says."""
    assert isinstance(model, MViT)
    return load_weights(model, source, allow_new_head=new_head, inflation=config.model.inflation).summary()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K) against target distributions (B, K), in fp32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def top_k(config: RunConfig, num_classes: int, device: torch.device, reports: Reports | None = None) -> "TopK":
    """Return the metric of a recipe, which also writes the files that are asked for, with the names of the classes."""
    if reports is None:
        return TopK(num_classes, device)
    results = None
    if reports.files():
        results = ClassResults(reports, class_names(config).names[:num_classes], min(5, num_classes))
    return TopK(num_classes, device, results, reports.labels)


class TopK:
    """Top-1 and top-5 accuracy and the cross-entropy, beside the share of the most frequent class.

    Of predictions with more columns than `num_classes` the first ones alone compete. `results` also gets them all.
    Labels that are `given`, one for each sample, stand for the batches'; where they are sets of right classes, there
    are further figures over the samples that have any: given_top1, given_top5, given_samples.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        results: ClassResults | None = None,
        given: GivenLabels | None = None,
    ) -> None:
        self._results, self._given = results, given
        self._k = min(5, num_classes)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-k, loss, samples
        self._labels = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._given_sums = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-k, samples

    def update(self, predictions: Tensor, batch: ImageBatch | VideoBatch) -> None:
        """Add logits (B, K)."""
        predictions = predictions[:, : len(self._labels)]
        labels, weights = batch.labels, batch.weights.double()
        best = predictions.topk(self._k, dim=1).indices  # (B, k)
        if self._given is not None:
            accepted = self._given.of(batch.sample_ids)  # (B, M)
            if self._given.replace:
                labels = accepted[:, 0]
            among = (best[:, :, None] == accepted[:, None]).any(dim=2)  # (B, k); -1 is no class
            columns = (among[:, 0], among.any(dim=1), (accepted >= 0).any(dim=1))
            self._given_sums += torch.stack([(column * weights).sum() for column in columns])
        if self._results is not None:
            self._results.add(predictions, labels, batch)
        hits = best == labels[:, None]
        loss = F.cross_entropy(predictions, labels, reduction="none").double()
        columns = (hits[:, 0].double(), hits.any(dim=1).double(), loss, torch.ones_like(loss))
        self._sums += torch.stack([(column * weights).sum() for column in columns])
        self._labels.index_add_(0, labels, weights)

    def compute(self) -> dict[str, float]:
        sums, labels = sum_over_ranks(self._sums).tolist(), sum_over_ranks(self._labels)
        top1, topk, loss, count = sums
        if self._results is not None:
            self._results.write()
        given: dict[str, float] = {}
        if self._given is not None and not self._given.replace:
            given_top1, given_topk, counted = sum_over_ranks(self._given_sums).tolist()
            rest = {"given_top1": given_top1, f"given_top{self._k}": given_topk}
            given = {name: hits / max(counted, 1) for name, hits in rest.items()} | {"given_samples": counted}
        return {
            "top1": top1 / count,
            f"top{self._k}": topk / count,
            "loss": loss / count,
            "majority": float(labels.max()) / count,
            "samples": count,
            **given,
        }
