"""Cross-validation over classes, or tasks: the split "train" divided into folds; "val" and "test" stay untouched.

A family that knows its classes has a method `fold`, which divides these: no class is in two folds. Of any other, such as sine
waves or a function of the user's own, the stream of episodes is divided: every k-th episode belongs to a fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from metaoptim.core import trees
from metaoptim.core.checks import check_counts
from metaoptim.core.types import Task
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.base import check_split, in_fold

SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Stream:
    """A family that knows no classes, its episodes of split "train" divided: part `number` of `count` is "val"."""

    family: TaskFamily
    number: int
    count: int

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the fold's stream (seed, split), stacked: T = count."""
        check_split(split, SPLITS)
        numbers = in_fold(split, range(start, start + count), self.number, self.count)
        batch = self.family.sample("train", seed=seed, start=numbers[0], count=numbers[-1] - numbers[0] + 1)
        rows = torch.tensor(numbers) - numbers[0]
        found: Task = trees.map_tensors(lambda x: x[rows.to(x.device)], batch)
        return found

    def describe(self, split: str) -> dict[str, Any]:
        """As the family does of its split "train", and which part of it this is."""
        check_split(split, SPLITS)
        return {**self.family.describe("train"), "split": split, "fold": [self.number, self.count]}


def folded(tasks: Any, number: int, count: int) -> Any:
    """A family of the same kind with the splits "train" and "val" alone, of which "val" is fold `number` of `count`.

    Both are parts of the family's own split "train". ValueError for a family without one, or with too few classes.
    """
    check_counts(2, folds=count)
    if "train" not in tasks.splits:
        raise ValueError(
            f"these tasks have the splits {', '.join(tasks.splits)}; folds are parts of a split train, which they lack."
        )
    if not hasattr(tasks, "fold"):
        return Stream(tasks, number, count)
    try:
        return tasks.fold(number, count)
    except ValueError as error:
        raise ValueError(f"folds={count}: {error}") from error
