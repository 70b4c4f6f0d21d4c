"""Learned optimizers: update rules that are networks, small ones, and the training problems on which they are meta-trained.

A learned rule is a `Rule`, like those of `metaoptim.rules`, with the weights of its network as ψ.
"""

from metaoptim.lopt.baselines import BASELINES, Baseline
from metaoptim.lopt.celo2 import Celo2
from metaoptim.lopt.data import Data
from metaoptim.lopt.families import (
    convnet,
    held_out,
    logistic,
    mlp,
    mlps,
    quadratics,
    training_families,
    transformer,
)
from metaoptim.lopt.judge import evaluate
from metaoptim.lopt.judgement import Judgement
from metaoptim.lopt.learner import Optimizee
from metaoptim.lopt.lstm import LSTM
from metaoptim.lopt.mixture import Mixture, mixture
from metaoptim.lopt.module import from_module
from metaoptim.lopt.problem import Problems
from metaoptim.lopt.small_fc import SmallFC
from metaoptim.lopt.streams import Streams
from metaoptim.lopt.training import learned_optimizer, meta_train

__all__ = [
    "BASELINES",
    "LSTM",
    "Baseline",
    "Celo2",
    "Data",
    "Judgement",
    "Mixture",
    "Optimizee",
    "Problems",
    "SmallFC",
    "Streams",
    "convnet",
    "evaluate",
    "from_module",
    "held_out",
    "learned_optimizer",
    "logistic",
    "meta_train",
    "mixture",
    "mlp",
    "mlps",
    "quadratics",
    "training_families",
    "transformer",
]
