"""mvit: multiscale vision transformers (MViTv2, arXiv 2112.01526) and the system that trains them.

The names below are the public surface; each is imported on first use, so that `import mvit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvit.config import RunConfig, load_config
    from mvit.evaluation import evaluate
    from mvit.export import load_model
    from mvit.prediction import predict
    from mvit.trainer import TrainResult, train
    from mvit.variants import create_backbone, create_model
    from mvit.weights import LoadReport, load_weights

__version__ = "0.1.0"
__all__ = [
    "LoadReport",
    "RunConfig",
    "TrainResult",
    "create_backbone",
    "create_model",
    "evaluate",
    "load_config",
    "load_model",
    "load_weights",
    "predict",
    "train",
]

_HOME = {
    "create_model": "mvit.variants",
    "create_backbone": "mvit.variants",
    "load_weights": "mvit.weights",
    "LoadReport": "mvit.weights",
    "load_config": "mvit.config",
    "RunConfig": "mvit.config",
    "load_model": "mvit.export",
    "train": "mvit.trainer",
    "TrainResult": "mvit.trainer",
    "evaluate": "mvit.evaluation",
    "predict": "mvit.prediction",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mvit' has no attribute {name!r}")
