"""Image classification: soft-target cross-entropy after mixup and cutmix, top-1 and top-5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import ImageBatch
from data_pipeline.image import ImageTransform, collate_images
from data_pipeline.mixup import DeviceAugment, normalize
from mvit.config import RunConfig
from mvit.distributed import sum_over_ranks
from mvit.model.backbone import MViT
from mvit.tasks.base import Forward
from mvit.variants import create_model
from mvit.weights import load_weights


class ImageClassification:
    """The task of the paper's section 5.1."""

    figure_of_merit = "top1"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._image = config.image
        self._augment = DeviceAugment(config.image, config.model.num_classes)

    def build_model(self) -> MViT:
        model = self._config.model
        built = create_model(
            model.resolved_variant(),
            num_classes=model.num_classes,
            input_size=self._image.image_size,
            class_token=model.class_token,
            expand=model.expand,
            drop_path=model.drop_path,
            absolute_positions=model.absolute_positions,
            relative_positions=model.relative_positions,
            residual_pooling=model.residual_pooling,
            head_dropout=model.head_dropout,
            attention_form=model.attention_form,
        )
        stages = self._config.train.activation_checkpointing
        if stages != "off":
            built.set_activation_checkpointing(("stage1", "stage2", "stage3", "stage4") if stages == "all" else stages)
        return built

    def load_weights(
        self, model: nn.Module, source: str | Path | Mapping[str, Tensor], *, new_head: bool = False
    ) -> str:
        assert isinstance(model, MViT)
        return load_weights(model, source, allow_new_head=new_head).summary()

    def transform(self, train: bool) -> ImageTransform:
        return ImageTransform(self._image, train=train)

    def collate(self, items: Sequence[Any]) -> ImageBatch:
        return collate_images(items)

    def losses(self, model: Forward, batch: ImageBatch, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        images, targets = self._augment(batch, seed, dtype)
        return {"loss": soft_cross_entropy(model(images), targets)}

    def predict(self, model: Forward, batch: ImageBatch, *, dtype: torch.dtype) -> Tensor:
        return model(normalize(batch, self._image, dtype)).float()

    def metric(self, device: torch.device) -> "TopK":
        return TopK(self._config.model.num_classes, device)

    def preview(self, batch: ImageBatch, *, seed: int, limit: int) -> Tensor:
        images, _ = self._augment(batch, seed, torch.float32)
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self._image.mean, device=images.device).view(shape)
        std = torch.tensor(self._image.std, device=images.device).view(shape)
        return (images[:limit] * std + mean).clamp(0, 1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K) against target distributions (B, K), in fp32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


class TopK:
    """Top-1 and top-5 accuracy and the cross-entropy, beside the share of the most frequent class."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._k = min(5, num_classes)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-k, loss, samples
        self._labels = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def update(self, predictions: Tensor, batch: ImageBatch) -> None:
        """Add logits (B, K)."""
        labels, weights = batch.labels, batch.weights.double()
        hits = predictions.topk(self._k, dim=1).indices == labels[:, None]
        loss = F.cross_entropy(predictions, labels, reduction="none").double()
        columns = (hits[:, 0].double(), hits.any(dim=1).double(), loss, torch.ones_like(loss))
        self._sums += torch.stack([(column * weights).sum() for column in columns])
        self._labels.index_add_(0, labels, weights)

    def compute(self) -> dict[str, float]:
        sums, labels = sum_over_ranks(self._sums).tolist(), sum_over_ranks(self._labels)
        top1, topk, loss, count = sums
        return {
            "top1": top1 / count,
            f"top{self._k}": topk / count,
            "loss": loss / count,
            "majority": float(labels.max()) / count,
            "samples": count,
        }
