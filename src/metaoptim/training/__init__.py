"""Meta-training: the outer loop, and φ in loops that people already have."""

from metaoptim.training.bilevel import bilevel
from metaoptim.training.hypergradient import Hypergradient, hypergradient
from metaoptim.training.meta_train import meta_train
from metaoptim.training.module import MetaModule
from metaoptim.training.state import TrainingError
from metaoptim.training.train import Interrupted, train

__all__ = [
    "Hypergradient",
    "Interrupted",
    "MetaModule",
    "TrainingError",
    "bilevel",
    "hypergradient",
    "meta_train",
    "train",
]
