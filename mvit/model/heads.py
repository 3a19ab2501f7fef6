"""From tokens to logits: the read-out (class token or mean) and the linear classifier."""

from typing import Literal, get_args

from torch import Tensor, nn

from mvit.model.linear import Linear

Readout = Literal["class_token", "mean", "mean_then_norm"]
READOUTS: tuple[str, ...] = get_args(Readout)


def read_out(tokens: Tensor, norm: nn.Module, kind: str, class_tokens: int) -> Tensor:
    """Reduce tokens (B, L, C) to features (B, C).

    "class_token" normalises the class token; "mean" normalises every patch token, then averages (the published image
    models); "mean_then_norm" averages first (SlowFast's USE_MEAN_POOLING, used to fine-tune from masked pre-training).
    """
    if kind == "class_token":
        return norm(tokens[:, 0])
    patches = tokens[:, class_tokens:]
    if kind == "mean":
        return norm(patches).mean(dim=1)
    return norm(patches.mean(dim=1))


class ClassificationHead(nn.Module):
    """Dropout, then a linear layer: features (B, C) → logits (B, num_classes); softmax is never applied."""

    def __init__(self, dim: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.dropout(features))
