"""Training, evaluation and runs: the only place that changes tensors in place and writes files."""

from metaoptim.loop.evaluate import evaluate
from metaoptim.loop.meta_train import meta_train
from metaoptim.loop.module import MetaModule
from metaoptim.loop.result import Result
from metaoptim.loop.run import Run, load
from metaoptim.loop.state import TrainingError
from metaoptim.loop.train import Interrupted, train

__all__ = ["Interrupted", "MetaModule", "Result", "Run", "TrainingError", "evaluate", "load", "meta_train", "train"]
