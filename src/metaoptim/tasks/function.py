"""A task family from any function that samples one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import check_split, raw

Sample = Callable[[torch.Generator, str], tuple[Batch, Batch]]
"""One task: `sample(generator, split) -> ((x, y) of the support, (x, y) of the query)`, or other trees of tensors."""


def from_function(sample: Sample, splits: Sequence[str] = ("train", "val", "test"), name: str = "function") -> FunctionTasks:
    """A task family from a function that samples one task; it is called once per task, T times.

    All randomness must come from the generator, which is seeded from (seed, split, episode). Then an episode
    is the same in every run. The function itself must keep the classes of the splits apart.

    Args:
        sample: `sample(generator, split)` returns one task's support and query: tensors ((x, y), (x, y)), or dicts of them.
        splits: The splits that the function knows.
        name: The family's name, for records.
    """
    return FunctionTasks(sample, tuple(splits), name)


@dataclass(frozen=True)
class FunctionTasks:
    """The family that `from_function` builds; its fields are that function's arguments."""

    function: Sample
    splits: tuple[str, ...]
    name: str

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        check_split(split, self.splits)
        seeds = raw(seed, f"function/{split}", start, count, 1)[:, 0] >> 1  # torch takes no 64-bit seeds
        episodes = [self._checked(self.function(torch.Generator().manual_seed(int(s)), split)) for s in seeds]
        for i, episode in enumerate(episodes):
            if (found := _shapes(episode)) != (expected := _shapes(episodes[0])):
                raise ValueError(
                    f"`{self.name}` gave tensors of shapes {found} for episode {start + i}, but {expected} "
                    f"for episode {start}; all tasks of a family must have the same shapes."
                )
        batch: Task = trees.stack(episodes)
        return batch

    def describe(self, split: str) -> dict[str, Any]:
        """Family and split; only its author knows what the function does."""
        check_split(split, self.splits)
        return {"family": self.name, "options": {}, "split": split}

    def _checked(self, task: Any) -> Task:
        """The task that the function returned: two pairs, or two trees of tensors of any other kind."""
        parts = task if isinstance(task, tuple | list) and len(task) == 2 else ()
        if not parts or not all(isinstance(p, tuple | list | dict) and p and _tensors_alone(p) for p in parts):
            raise ValueError(
                f"`{self.name}` returned {_kind(task)}; it must return ((x, y), (x, y)): the "
                "support and the query of one task, as tensors (or dicts of them)."
            )
        for name, part in zip(Task._fields, parts, strict=True):
            shapes = [tuple(x.shape) for x in trees.flatten(part)]
            if not all(shapes) or len({s[0] for s in shapes}) != 1 or not shapes[0][0]:
                told = f"{shapes[0]} inputs and {shapes[1]} targets" if len(shapes) == 2 else f"shapes {shapes}"
                raise ValueError(
                    f"`{self.name}` returned a {name} of {told}; the first axis of all must count the same "
                    "examples, one or more."
                )
        return Task(*parts)


def _tensors_alone(tree: Any) -> bool:
    return all(isinstance(x, Tensor) for x in trees.flatten(tree))


def _shapes(task: Task) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in trees.flatten(task))


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__
