"""Where the tasks of an outer step come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, MetaParams, Task
from metaoptim.learners import Heads
from metaoptim.tasks import ImageTasks, TaskFamily
from metaoptim.tasks.training_tasks import check_heads, numbered

Source = Callable[[int, MetaParams], Task]
"""(outer steps done, φ) -> T tasks. A function of both alone, so that a resumed run sees what an uninterrupted one does: a
task family's episodes, or trajectories that the current policy and the adapted ones have collected."""


@dataclass(frozen=True)
class Episodes:
    """Episodes of a task family's split "train", T of them at a time, each kept for as many outer steps as `lasts` says."""

    tasks: TaskFamily
    seed: int
    count: int
    lasts: int = 1

    def __call__(self, outer_step: int, phi: MetaParams) -> Task:
        batch = self.tasks.sample("train", seed=self.seed, start=self.first(outer_step), count=self.count)
        return trees.to(batch, phi.device)

    def first(self, outer_step: int) -> int:
        """The number of the first episode."""
        return outer_step // self.lasts * self.count


@dataclass(frozen=True)
class PooledImages:
    """Images of all training classes, labelled by class: T batches of the shape of episodes, in which there are no tasks."""

    tasks: ImageTasks
    seed: int
    count: int

    def __call__(self, outer_step: int, phi: MetaParams) -> Task:
        support = self.tasks.ways * self.tasks.support_shots("train")
        rows = support + self.tasks.ways * self.tasks.queries
        size = self.count * rows
        images = self.tasks.batch("train", seed=self.seed, start=outer_step * size, count=size)
        x, y = (part.unflatten(0, (self.count, rows)) for part in images)
        return trees.to(Task((x[:, :support], y[:, :support]), (x[:, support:], y[:, support:])), phi.device)


@dataclass(frozen=True)
class SharedTasks:
    """Examples of T of the training tasks, each with the number of its head: T batches of the shape of episodes."""

    tasks: TaskFamily
    seed: int
    count: int
    heads: Heads

    def __post_init__(self) -> None:
        check_heads(self.tasks, self.heads.heads, self.heads.outputs)

    def __call__(self, outer_step: int, phi: MetaParams) -> Task:
        batch = numbered(self.tasks, self.heads.heads, seed=self.seed, step=outer_step, count=self.count)
        return trees.to(batch, phi.device)


def source_of(method: MetaOptimizer, tasks: TaskFamily, seed: int, count: int) -> Source:
    """What a method trains on: episodes; pooled images where it learns a classifier of all training classes; or examples of
    training tasks where each has a head."""
    pooled = getattr(method.learner, "pooled", None)
    if isinstance(pooled, Heads):
        return SharedTasks(tasks, seed, count, pooled)
    classes = getattr(pooled, "classes", None)
    if classes is None:
        return Episodes(tasks, seed, count, method.estimator.lasts(method.learner))
    if not isinstance(tasks, ImageTasks):
        raise ValueError(
            f"{method.name} trains a classifier of all training classes, and these tasks have none that they share: train with "
            "an image family, or take joint."
        )
    if classes != (found := tasks.classes("train")):
        raise ValueError(
            f"{method.name} was built with classes={classes}, and the tasks have {found}: set classes={found} "
            f"(in a recipe: algorithm.classes={found})."
        )
    return PooledImages(tasks, seed, count)
