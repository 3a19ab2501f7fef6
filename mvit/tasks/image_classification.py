"""Image classification: soft-target cross-entropy after mixup and cutmix, top-1 and top-5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import ImageBatch
from data_pipeline.image import ImageTransform, collate_images
from data_pipeline.mixup import DeviceAugment, normalize
from mvit.config import ConfigError, RunConfig
from mvit.model.backbone import MViT
from mvit.results_file import Reports
from mvit.tasks.base import Forward
from mvit.tasks.classification import (
    TopK,
    build_classifier,
    load_classifier,
    logits_of_noise,
    soft_cross_entropy,
    top_k,
    training_flops,
)


class ImageClassification:
    """The task of the paper's section 5.1."""

    figure_of_merit = "top1"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._image = config.image
        self._evaluated_classes = config.image.evaluated_classes or config.model.num_classes
        if self._evaluated_classes > config.model.num_classes:
            raise ConfigError(
                f"image.evaluated_classes = {self._evaluated_classes} is more than model.num_classes = "
                f"{config.model.num_classes}; lower it, or leave it out to evaluate on all classes"
            )
        self._augment = DeviceAugment(config.image, config.model.num_classes)

    def build_model(self) -> MViT:
        return build_classifier(self._config)

    def load_weights(
        self, model: nn.Module, source: str | Path | Mapping[str, Tensor], *, new_head: bool = False
    ) -> str:
        return load_classifier(model, source, self._config, new_head=new_head)

    def flops_per_sample(self) -> float:
        return training_flops(self._config)

    def transform(self, train: bool, *, all_views: bool = False) -> ImageTransform:
        del all_views  # an image has one
        return ImageTransform(self._image, train=train)

    def test_views(self) -> tuple[int, str]:
        return 1, "1 view of each picture"

    def evaluation_samples(self, batch_size: int, *, all_views: bool = False) -> int:
        del all_views
        return batch_size

    def collate(self, items: Sequence[Any]) -> ImageBatch:
        return collate_images(items)

    def losses(self, model: Forward, batch: ImageBatch, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        images, targets = self._augment(batch, seed, dtype)
        return {"loss": soft_cross_entropy(model(images), targets)}

    def predict(self, model: Forward, batch: ImageBatch, *, dtype: torch.dtype) -> Tensor:
        return model(normalize(batch, self._image, dtype)).float()

    def answer(self, model: nn.Module) -> Tensor:
        return logits_of_noise(model, self._config)

    def metric(self, device: torch.device, reports: Reports | None = None) -> TopK:
        return top_k(self._config, self._evaluated_classes, device, reports)

    def preview(self, batch: ImageBatch, *, seed: int, limit: int) -> Tensor:
        images, _ = self._augment(batch, seed, torch.float32)
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self._image.mean, device=images.device).view(shape)
        std = torch.tensor(self._image.std, device=images.device).view(shape)
        return (images[:limit] * std + mean).clamp(0, 1)

    def show(self, predictions: Tensor, batch: ImageBatch, *, limit: int) -> None:
        return None
