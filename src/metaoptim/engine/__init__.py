"""Maps an estimator that is written for one task over a batch of tasks, the fastest way that gives the same numbers."""

from metaoptim.engine.autotune.search import Plan, offered
from metaoptim.engine.engine import Engine
from metaoptim.engine.executor import Way, check_tasks
from metaoptim.engine.options import SETTINGS, Choice
from metaoptim.engine.rollout import adapt, rest, rollout

__all__ = ["SETTINGS", "Choice", "Engine", "Plan", "Way", "adapt", "check_tasks", "offered", "rest", "rollout"]
