"""Video classification: clips in training, several views of each video averaged in the test (paper section 5.3)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import VideoBatch
from data_pipeline.mixup import DeviceAugment, normalize_pixels
from data_pipeline.video import VideoTransform, collate_videos
from mvit.config import RunConfig
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

_FRAMES_SHOWN = 8


class VideoClassification:
    """Evaluations during training look at one centre clip and crop of each video, the test at all its views."""

    figure_of_merit = "top1"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._video = config.video
        self._augment = DeviceAugment(config.video, config.model.num_classes)

    def build_model(self) -> MViT:
        return build_classifier(self._config)

    def load_weights(
        self, model: nn.Module, source: str | Path | Mapping[str, Tensor], *, new_head: bool = False
    ) -> str:
        return load_classifier(model, source, self._config, new_head=new_head)

    def flops_per_sample(self) -> float:
        return training_flops(self._config)

    def transform(self, train: bool, *, all_views: bool = False) -> VideoTransform:
        return VideoTransform(self._video if train or all_views else self._video.single_view(), train=train)

    def test_views(self) -> tuple[int, str]:
        clips, crops = self._video.num_clips, self._video.num_crops
        return self._video.views, f"{self._video.views} view(s) of each video: {clips} clip(s) x {crops} crop(s)"

    def evaluation_samples(self, batch_size: int, *, all_views: bool = False) -> int:
        return max(1, batch_size // self._video.views) if all_views else batch_size

    def collate(self, items: Sequence[Any]) -> VideoBatch:
        return collate_videos(items)

    def losses(self, model: Forward, batch: VideoBatch, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        clips, targets = self._augment(batch, seed, dtype)
        return {"loss": soft_cross_entropy(model(clips), targets)}

    def predict(self, model: Forward, batch: VideoBatch, *, dtype: torch.dtype) -> Tensor:
        """Return the logarithm of each video's class probabilities, averaged over its views: (B, K).

        At most `train.evaluation_batch_size` clips are computed at once, on every rank equally often.
        """
        videos, views = batch.clips.shape[:2]
        logits = torch.cat(
            [
                model(normalize_pixels(clips, self._video).to(dtype)).float()
                for clips in batch.clips.flatten(0, 1).split(self._config.train.evaluation_batch_size)
            ]
        )
        return logits.log_softmax(dim=-1).view(videos, views, -1).logsumexp(dim=1) - math.log(views)

    def answer(self, model: nn.Module) -> Tensor:
        return logits_of_noise(model, self._config)

    def metric(self, device: torch.device, reports: Reports | None = None) -> TopK:
        return top_k(self._config, self._config.model.num_classes, device, reports)

    def preview(self, batch: VideoBatch, *, seed: int, limit: int) -> Tensor:
        """Return each clip as a strip of frames, (N, 3, H, frames x W)."""
        clips, _ = self._augment(batch, seed, torch.float32)
        frames = clips.shape[2]
        shown = torch.linspace(0, frames - 1, min(frames, _FRAMES_SHOWN)).round().long()
        clips = clips[:limit, :, shown.to(clips.device)]  # (N, 3, F, H, W)
        mean, std = (
            torch.tensor(channels, device=clips.device).view(3, 1, 1, 1)
            for channels in (self._video.mean, self._video.std)
        )
        return (clips * std + mean).clamp(0, 1).transpose(2, 3).flatten(3)

    def show(self, predictions: Tensor, batch: VideoBatch, *, limit: int) -> None:
        return None
