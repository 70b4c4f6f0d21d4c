"""Where the tasks of an outer step come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaoptim.core import trees
from metaoptim.core.types import MetaParams, Task
from metaoptim.tasks import TaskFamily

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
