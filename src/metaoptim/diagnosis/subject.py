"""What is diagnosed: a run, the episodes it is looked at on, and its scores there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Learner, State, Task
from metaoptim.engine.rollout import adapt, start
from metaoptim.evaluation import Result, evaluate
from metaoptim.runs.run import Run
from metaoptim.tasks import TaskFamily

Numbers = dict[str, Any]
"""What a part has measured, in JSON types."""

Change = Callable[[Task, str, int, int], Task]
"""(episodes, split, seed, number of the first one) -> the same episodes, changed."""


@dataclass(frozen=True)
class Changed:
    """A task family whose episodes are changed, each in the same way however they are cut into batches."""

    family: TaskFamily
    change: Change

    @property
    def splits(self) -> tuple[str, ...]:
        return self.family.splits

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        return self.change(self.family.sample(split, seed=seed, start=start, count=count), split, seed, start)

    def describe(self, split: str) -> dict[str, Any]:
        return self.family.describe(split)


@dataclass(frozen=True)
class Subject:
    """A run, with the split and the seed of its episodes; `result` is its evaluation on all of them, and the first `closely`
    are those that single states, gradients and features are read from."""

    run: Run
    tasks: TaskFamily
    split: str
    seed: int
    closely: int
    result: Result

    @property
    def learner(self) -> Learner:
        return self.run.method.learner

    @property
    def adapts(self) -> bool:
        """Whether inner steps move anything; a closed form is done before the first one."""
        return bool(self.run.method.adapting)

    @cached_property
    def batch(self) -> Task:
        """The episodes that are looked at closely, on the run's device."""
        found = self.tasks.sample(self.split, seed=self.seed, start=0, count=self.closely)
        return trees.to(found, self.run.phi.device)

    def episodes(self) -> Iterator[Task]:
        """The same, one by one."""
        return (trees.index(self.batch, t) for t in range(self.closely))

    def start(self, task: Task) -> tuple[Tensor, State]:
        """(0, s_0)."""
        return start(self.run.method, self.run.phi, task.support, self.run.inherited)

    def end(self, task: Task) -> tuple[Tensor, State]:
        """(K, s_K)."""
        return adapt(self.run.method, self.run.phi, task.support, self.run.inherited, self.learner.steps)

    def judged(self, change: Change, episodes: int, steps: int | None = None) -> Result:
        """The run's evaluation on the first episodes, changed; after so many steps, or those of training."""
        return evaluate(
            self.run, Changed(self.tasks, change), split=self.split, episodes=episodes, steps=steps, baselines=(),
            seed=self.seed, progress=False,
        )  # fmt: skip


def interval(x: Tensor) -> tuple[float, float]:
    """The mean of a score (E) over episodes, and half its 95 % interval, 1.96 · s / √E."""
    x = x.double()
    return x.mean().item(), (1.96 * x.std() / len(x) ** 0.5).item()


def better(metric: str) -> int:
    """+1 where more is better, −1 where less is."""
    return 1 if metric == "accuracy" else -1


def shown(metric: str, value: float) -> str:
    """A score in a sentence."""
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3g}"
