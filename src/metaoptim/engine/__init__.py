"""Maps an estimator that is written for one task over a batch of tasks, the fastest way that gives the same numbers."""

from metaoptim.engine.choose import Choice
from metaoptim.engine.mapping import Engine, check_tasks
from metaoptim.engine.rollout import adapt, rest, rollout

__all__ = ["Choice", "Engine", "adapt", "check_tasks", "rest", "rollout"]
