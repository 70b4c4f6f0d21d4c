"""Maps an estimator that is written for one task over a batch of tasks, the fastest way that gives the same numbers."""

from metaoptim.engine.check import self_check
from metaoptim.engine.engine import Engine
from metaoptim.engine.mapping import Way, check_tasks
from metaoptim.engine.plan import Plan, offered
from metaoptim.engine.rollout import adapt, rest, rollout
from metaoptim.engine.settings import SETTINGS, Choice

__all__ = ["SETTINGS", "Choice", "Engine", "Plan", "Way", "adapt", "check_tasks", "offered", "rest", "rollout", "self_check"]
