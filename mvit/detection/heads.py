"""What is computed on pooled regions: box heads, their two linear outputs, and the mask head."""

from itertools import pairwise

from torch import Tensor, nn

from mvit.detection.config import DetectionConfig, HeadNorm
from mvit.detection.norm import conv_block

# Shape legend: R regions of a batch, C channels, S side of a pooled region, K classes, F features.

BOX_SIZE, MASK_SIZE = 7, 14  # sides of the regions that box and mask heads take
NUM_CONVS = 4


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def two_layer_head(channels: int, features: int) -> nn.Sequential:
    """Return the box head of Mask R-CNN, two linear layers: (R, C, 7, 7) → (R, F)."""
    first = _linear(channels * BOX_SIZE**2, features)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), _linear(features, features), nn.ReLU())


def convolutional_head(pyramid_channels: int, channels: int, features: int, norm: HeadNorm) -> nn.Sequential:
    """Return the box head of a published cascade stage, four convolutions and a linear layer: (R, C, 7, 7) → (R, F)."""
    widths = (pyramid_channels,) + (channels,) * NUM_CONVS
    convs = [conv_block(a, b, norm) for a, b in pairwise(widths)]
    return nn.Sequential(*convs, nn.Flatten(), _linear(channels * BOX_SIZE**2, features), nn.ReLU())


class BoxPredictor(nn.Module):
    """Features (R, F) → class logits (R, K + 1), background last, and deltas (R, 4 K), or (R, 4) for all classes."""

    def __init__(self, features: int, num_classes: int, *, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, num_classes + 1)
        self.bbox_pred = nn.Linear(features, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features), self.bbox_pred(features)


class MaskHead(nn.Module):
    """Four convolutions, one upsampling, one mask per class: (R, C, 14, 14) → logits (R, K, 28, 28)."""

    def __init__(self, config: DetectionConfig, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        channels = config.mask_channels
        widths = (config.pyramid_channels,) + (channels,) * NUM_CONVS
        self.convs = nn.Sequential(*(conv_block(a, b, norm) for a, b in pairwise(widths)))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.activation = nn.ReLU()
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (self.upsample, self.predictor):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        return self.predictor(self.activation(self.upsample(self.convs(regions))))
