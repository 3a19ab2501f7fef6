"""DetectionConfig: what a user may set of the detection heads, with the published values as defaults."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from mvit.model.window import AttentionScope

DetectorKind = Literal["mask_rcnn", "cascade_mask_rcnn"]
HeadNorm = Literal["none", "sync_batch", "layer"]
SoftNms = Literal["off", "linear", "gaussian"]


class DetectionConfig(Settings):
    """Heads and post-processing of a detector; the defaults are those of the published MViTv2 detectors.

    They are detectron2's: proposals and boxes are regressed with an L1 loss, regions are pooled with RoIAlign at
    half-pixel-correct positions, masks are trained on binary targets of 28 x 28.
    """

    masks: bool = True
    """Predict masks; False: boxes alone (Faster and Cascade R-CNN)."""
    head_norm: HeadNorm | None = None
    """Norm after the convolutions of the box and mask heads. None: as published, "sync_batch" (statistics over all
    ranks) for the cascade and "none" for Mask R-CNN; "layer" is ViTDet's, without any word between ranks. With a norm
    Mask R-CNN's box head too has four convolutions and one linear layer instead of two linear layers."""

    pyramid_channels: int = Field(default=256, gt=0)
    pyramid_norm: Literal["none", "layer"] = "none"
    """Norm after the convolutions of the feature pyramid; "layer" is ViTDet's."""
    box_channels: int = Field(default=256, gt=0)
    """Channels of the four convolutions of a cascade box head."""
    box_features: int = Field(default=1024, gt=0)
    """Width of the fully connected layers of the box heads."""
    mask_channels: int = Field(default=256, gt=0)

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """Side in pixels (of a square of equal area) of the anchors at strides 4, 8, 16, 32 and 64; they should be about as
    large as the objects are after resizing."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors at each place."""
    proposal_batch_size: int = Field(default=256, gt=0)
    """Anchors per image that train the proposals, at most half of them on objects."""
    proposals_before_nms: int = Field(default=2000, gt=0)
    """Best proposals of each pyramid level kept in training before non-maximum suppression."""
    proposals_before_nms_test: int = Field(default=1000, gt=0)
    proposals_after_nms: int = Field(default=1000, gt=0)
    """Proposals per image handed to the box heads, in training and in evaluation."""
    proposal_nms_iou: float = Field(default=0.7, gt=0, le=1)
    box_batch_size: int = Field(default=512, gt=0)
    """Proposals per image that train the box and mask heads, at most `box_positive_fraction` of them on objects."""
    box_positive_fraction: float = Field(default=0.25, gt=0, le=1)

    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    """Detections below are dropped before non-maximum suppression."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Overlap above which the lower-scored of two boxes of one class is dropped (linear soft-NMS: decayed)."""
    soft_nms: SoftNms = "off"
    """Decay the scores of overlapping boxes instead of dropping them (Bodla et al. 2017): the paper's Table A.1."""
    soft_nms_sigma: float = Field(default=0.5, gt=0)
    """Gaussian soft-NMS: scores are multiplied by exp(-IoU² / sigma)."""
    soft_nms_min_score: float = Field(default=1e-3, ge=0)
    """Detections whose decayed score is below are dropped."""
    detections_per_image: int = Field(default=100, gt=0)

    roi_aligned: bool = True
    """Pool regions half a pixel to the left and above (RoIAlign as corrected in detectron2); False: as torchvision."""
    roi_sampling_ratio: int = Field(default=0, ge=0)
    """Samples per bin and axis when pooling regions; 0: as many as the bin has pixels."""
    box_loss_beta: float = Field(default=0.0, ge=0)
    """Where the smooth L1 losses of boxes turn from quadratic to linear; 0 is the L1 loss."""
    binary_mask_targets: bool = True
    """Train masks on the true mask cut out and thresholded at one half; False: on the interpolated values."""

    @model_validator(mode="after")
    def _check_anchors(self) -> Self:
        sizes, ratios = self.anchor_sizes, self.anchor_ratios
        if len(sizes) != 5 or min(sizes) <= 0 or list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"anchor_sizes {list(sizes)} must be five, one for each level, positive and rising: "
                "[32, 64, 128, 256, 512]"
            )
        if not ratios or min(ratios) <= 0 or len(set(ratios)) < len(ratios):
            raise ValueError(f"anchor_ratios {list(ratios)} must be positive and differ: [0.5, 1.0, 2.0]")
        return self


class DetectorConfig(DetectionConfig):
    """A whole detector: its backbone's attention, its kind, its heads; `model` of the recipe says which backbone."""

    kind: DetectorKind = "cascade_mask_rcnn"
    """"mask_rcnn", or three box heads with rising IoU (paper section 5.2)."""
    attention: AttentionScope = "hwin"
    """Who sees whom in the backbone (paper Table 4): "hwin" windows but for the last block of stages 2 to 4, "full"
    pooling attention everywhere, "window" windows everywhere, "swin" shifted ones."""
    window_size: int = Field(default=56, ge=1)
    """Side of stage 1's windows in tokens (4 pixels each), halved with every stage."""
