"""Models, and normalisation layers that are correct under every function transform."""

from metaoptim.nn.call import alone, called, steady
from metaoptim.nn.cosine import Cosine, directions, scale_of, with_cosines
from metaoptim.nn.layers import blame, held, refuse
from metaoptim.nn.models import MODELS, conv4, mlp
from metaoptim.nn.modulation import ContextInput, FiLM, Transform
from metaoptim.nn.noise import noise, uniform
from metaoptim.nn.norms import BatchNorm, LayerNorm, batch_norms, convert, statistics, store_statistics
from metaoptim.nn.written_out import needs_written_out, written_out

__all__ = [
    "MODELS",
    "BatchNorm",
    "ContextInput",
    "Cosine",
    "FiLM",
    "LayerNorm",
    "Transform",
    "alone",
    "batch_norms",
    "blame",
    "called",
    "conv4",
    "convert",
    "directions",
    "held",
    "mlp",
    "needs_written_out",
    "noise",
    "refuse",
    "scale_of",
    "statistics",
    "steady",
    "store_statistics",
    "uniform",
    "with_cosines",
    "written_out",
]
