"""Models, and normalisation layers that are correct under every function transform."""

from metaoptim.nn.call import alone, called, steady
from metaoptim.nn.layers import blame, held, refuse
from metaoptim.nn.models import MODELS, conv4, mlp
from metaoptim.nn.noise import noise
from metaoptim.nn.norms import BatchNorm, LayerNorm, convert, statistics, store_statistics
from metaoptim.nn.written_out import needs_written_out, written_out

__all__ = [
    "MODELS",
    "BatchNorm",
    "LayerNorm",
    "alone",
    "blame",
    "called",
    "conv4",
    "convert",
    "held",
    "mlp",
    "needs_written_out",
    "noise",
    "refuse",
    "statistics",
    "steady",
    "store_statistics",
    "written_out",
]
