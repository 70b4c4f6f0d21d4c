"""Whether a training can be had at all: lower bounds of its memory."""

from __future__ import annotations

from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_memory
from metaoptim.core.types import MetaOptimizer
from metaoptim.tasks import TaskFamily

COPIES = 2  # of a batch of tasks, at the least, while it is put together
MANY = 10_000  # tasks
KEPT = 1024  # bytes beside the weights that an inner step leaves behind, at the least


def check_inner_run(method: MetaOptimizer) -> None:
    """The states of one inner run, where an outer step needs all of them; a ValueError where they are out of reach."""
    if "steps" in method.estimator.memories:
        state, steps = _size([method.phi.weights[name] for name in method.adapting]), method.learner.steps
        check_memory(steps * (state + KEPT), f"steps={steps}: the states of one inner run")


def check_batch(tasks: TaskFamily, seed: int, count: int) -> None:
    """The batch of T tasks of an outer step; a ValueError where it is out of reach."""
    if count < MANY:  # no task is drawn only to be weighed: what draws it may be slow, or count its calls
        return
    one = _size(trees.flatten(tasks.sample("train", seed=seed, start=0, count=1)))
    check_memory(COPIES * count * one, f"tasks_per_step={count}: a batch of so many tasks")


def _size(tensors: list[Tensor]) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))
