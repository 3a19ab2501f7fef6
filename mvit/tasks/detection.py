"""Detection and instance segmentation: MViTv2 with a feature pyramid and (Cascade) Mask R-CNN (paper section 5.2)."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import DetectionBatch
from data_pipeline.detection import DetectionTransform, collate_detections, ground_truth
from data_pipeline.mixup import normalize_pixels
from data_pipeline.shards import open_shards
from mvit.class_names import class_names
from mvit.config import ConfigError, RunConfig
from mvit.detection.boxes import Target
from mvit.detection.coco_metric import CocoMetric
from mvit.detection.detections import Detections
from mvit.detection.detector import Detector, create_detector
from mvit.detection.draw import draw_objects
from mvit.detection.multi_scale import View, detect_in_views
from mvit.model.pyramid import StagePyramid
from mvit.results_file import Reports
from mvit.tasks.base import Forward
from mvit.variants import create_backbone
from mvit.weights import load_weights, read_state

_SHOWN_SCORE = 0.5


class Detection:
    """Pictures of different sizes in padded batches; the metric is COCO's, over each picture exactly once."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._inputs = config.detection
        self.figure_of_merit = "mask_ap" if config.detector.masks else "box_ap"

    def build_model(self) -> Detector:
        model, options = self._config.model, self._config.detector
        backbone = create_backbone(
            model.resolved_variant(),
            expand=model.expand or "attention",
            hybrid_window=options.attention == "hwin",
            attention=options.attention,
            window_size=options.window_size,
            drop_path=model.drop_path,
            relative_positions=model.relative_positions,
            absolute_positions=model.absolute_positions,
            residual_pooling=model.residual_pooling,
            attention_form=model.attention_form,
            drop_path_mode=model.drop_path_mode,
        )
        backbone.set_activation_checkpointing(self._config.train.checkpointed_stages)
        return create_detector(backbone, options.kind, model.num_classes, options)

    def load_weights(
        self, model: nn.Module, source: str | Path | Mapping[str, Tensor], *, new_head: bool = False
    ) -> str:
        """Load a whole detector of ours, or what any published naming has for its backbone."""
        assert isinstance(model, Detector)
        state = read_state(source)
        if any(name.startswith("pyramid.backbone.") for name in state):
            return _load_detector(model, state, new_head=new_head)
        backbone = model.pyramid.backbone
        assert isinstance(backbone, StagePyramid)
        return f"the backbone: {load_weights(backbone, source).summary()}"

    def flops_per_sample(self) -> float:
        """Return 0: pictures differ in size and heads in the number of regions, so there is no such figure."""
        return 0.0

    def transform(self, train: bool, *, all_views: bool = False) -> DetectionTransform:
        return DetectionTransform(self._inputs if train or all_views else self._inputs.single_view(), train=train)

    def test_views(self) -> tuple[int, str]:
        inputs = self._inputs
        sides = ", ".join(map(str, inputs.test_short_sides or (inputs.test_short_side,)))
        mirrored = ", as it is and mirrored" if inputs.test_flip else ""
        return inputs.num_views, f"{inputs.num_views} view(s) of each picture: short side {sides}{mirrored}"

    def evaluation_samples(self, batch_size: int, *, all_views: bool = False) -> int:
        return max(1, batch_size // self._inputs.num_views) if all_views else batch_size

    def collate(self, items: Sequence[Any]) -> DetectionBatch:
        return collate_detections(items, self._inputs)

    def losses(self, model: Forward, batch: DetectionBatch, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the detector's named losses; anchors and proposals are drawn from torch's random state."""
        del seed
        masks = batch.masks or (None,) * len(batch)
        rows = zip(batch.boxes, batch.labels, masks, batch.is_crowd, strict=True)
        return model(self._normalised(batch.images, dtype), batch.sizes, [Target(*row) for row in rows])

    def predict(self, model: Forward, batch: DetectionBatch, *, dtype: torch.dtype) -> list[Detections]:
        """Return what is found in each picture: in pixels of the batch, of several views in those of the original.

        Pictures are computed one after the other, each with its own padding: what is found in one depends on no other,
        nor does the AP on how they are put into batches.
        """
        if batch.all_views is None:
            found: list[Detections] = []
            unit = self._inputs.size_divisibility
            for image, size, (height, width) in zip(batch.images, batch.sizes, batch.sizes.tolist(), strict=True):
                padded = image[None, :, : height + -height % unit, : width + -width % unit]
                found += model(self._normalised(padded, dtype), size[None])
            return found
        assert isinstance(model, Detector)  # an engine has no need of it: evaluations in training are plain
        rows = zip(batch.views, batch.original_sizes.tolist(), strict=True)
        return [detect_in_views(model, self._looks(views, dtype), (height, width)) for views, (height, width) in rows]

    def answer(self, model: nn.Module) -> Tensor:
        """Return the pyramid's maps and the scored boxes of a fixed random picture, behind one another."""
        assert isinstance(model, Detector)
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        pyramid, [found] = model.candidates(pixels, [(224, 224)])
        [detections] = model.with_masks(pyramid, [found])
        parts = [*pyramid.maps.values(), found.boxes, found.scores]
        parts += [] if detections.masks is None else [detections.masks]
        return torch.cat([part.flatten() for part in parts])

    def metric(self, device: torch.device, reports: Reports | None = None) -> CocoMetric:
        del device
        reports = reports or Reports()
        if reports.confusion is not None or reports.labels is not None:
            raise ConfigError(
                "a detector has no confusion image and no other labels; leave confusion and labels out, and take "
                "per_class, a table of the categories, or results, which COCO's tools read"
            )
        return CocoMetric(
            self._truth,
            max_missing=self._config.data.max_bad_samples,
            results_file=reports.results,
            per_class=reports.per_class,
        )

    def _truth(self) -> dict[str, Any]:
        """Read the objects of the validation set; rank 0 alone asks, when everything has been predicted."""
        data = self._config.data
        assert data.validation is not None
        return ground_truth(
            open_shards(
                data.validation,
                cache_dir=data.cache_dir,
                cache_gib=data.cache_gib,
                required=self._config.required_members,
            ),
            self._config.model.num_classes,
        )

    def preview(self, batch: DetectionBatch, *, seed: int, limit: int) -> Tensor:
        """Return pictures with their true boxes and masks drawn on them."""
        del seed
        masks = batch.masks or (None,) * len(batch)
        rows = list(zip(batch.images, batch.boxes, batch.labels, masks, strict=True))[:limit]
        return torch.stack([draw_objects(*row, names=self._names) for row in rows]).float() / 255

    def show(self, predictions: Sequence[Detections], batch: DetectionBatch, *, limit: int) -> Tensor:
        """Return pictures with what was found on the left and the truth on the right."""
        masks = batch.masks or (None,) * len(batch)
        shown = []
        rows = zip(predictions, batch.images, batch.boxes, batch.labels, masks, strict=True)
        for found, image, boxes, labels, true_masks in islice(rows, limit):
            sure = found.scores >= _SHOWN_SCORE
            pasted = None if found.masks is None else found.pasted()[sure]
            drawn = draw_objects(image, found.boxes[sure], found.labels[sure], pasted, found.scores[sure], self._names)
            true = draw_objects(image, boxes, labels, true_masks, names=self._names)
            shown.append(torch.cat((drawn, true), dim=2))
        return torch.stack(shown).float() / 255

    @cached_property
    def _names(self) -> Sequence[str]:
        """Names of the categories, or their numbers where the data does not tell."""
        return class_names(self._config).names

    def _normalised(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return normalize_pixels(images, self._inputs).to(dtype)

    def _looks(self, views: Sequence[Tensor], dtype: torch.dtype) -> list[View]:
        """Return one picture's views (3, h, w), each for itself: what is found must not depend on its neighbours."""
        looks: list[View] = []
        for pixels in views:
            height, width = size = (pixels.shape[1], pixels.shape[2])
            for mirrored in (False, True) if self._inputs.test_flip else (False,):
                unit = self._inputs.size_divisibility
                padded = pixels.new_tensor(self._inputs.fill).repeat(
                    1, height + -height % unit, width + -width % unit, 1
                )
                padded[0, :height, :width] = (pixels.flip(-1) if mirrored else pixels).permute(1, 2, 0)
                looks.append(View(self._normalised(padded.permute(0, 3, 1, 2), dtype), size, mirrored))
        return looks


def _load_detector(model: Detector, state: Mapping[str, Tensor], *, new_head: bool) -> str:
    """Set the whole detector; with `new_head` what has another number of classes starts anew."""
    wanted = model.state_dict()
    unfit = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected or (unfit and not new_head):
        named = ", ".join([*missing, *unexpected, *unfit][:5])
        raise ValueError(
            f"the weights are those of another detector: {len(missing)} tensors are missing, {len(unexpected)} are "
            f"unexpected, {len(unfit)} have other shapes ({named}); give the recipe the same model and detector "
            "sections, or model.new_head=true if only the classes differ"
        )
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in unfit}, strict=False)
    anew = f", {len(unfit)} start anew: {', '.join(unfit)}" if unfit else ""
    return f"the detector: {len(state) - len(unfit)} tensors loaded{anew}"
