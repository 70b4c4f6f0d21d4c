"""Models, and normalisation layers that are right under every function transform."""

from metaoptim.nn.models import MODELS, conv4, mlp
from metaoptim.nn.norms import BatchNorm, LayerNorm, convert, refuse_running_statistics, statistics, store_statistics

__all__ = [
    "MODELS",
    "BatchNorm",
    "LayerNorm",
    "conv4",
    "convert",
    "mlp",
    "refuse_running_statistics",
    "statistics",
    "store_statistics",
]
