"""Evaluates runs on held-out episodes."""

from metaoptim.evaluation.evaluate import evaluate
from metaoptim.evaluation.result import Result

__all__ = ["Result", "evaluate"]
