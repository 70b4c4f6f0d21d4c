"""Maps an estimator that is written for one task over a batch of tasks, the fastest way that gives the same numbers."""

from metaoptim.engine.autotune.search import Plan, offered
from metaoptim.engine.batches import doubts, look_at
from metaoptim.engine.engine import Engine
from metaoptim.engine.executor import Executor, check_tasks, count_tasks
from metaoptim.engine.options import SETTINGS, Choice, chosen
from metaoptim.engine.rollout import adapt, heritage, rollout

__all__ = [
    "SETTINGS", "Choice", "Engine", "Executor", "Plan", "adapt", "check_tasks", "chosen", "count_tasks", "doubts", "heritage",
    "look_at", "offered", "rollout",
]  # fmt: skip
