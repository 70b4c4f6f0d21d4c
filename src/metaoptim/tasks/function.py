"""Tasks from any function that samples one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import check_split, raw

Sample = Callable[[torch.Generator, str], tuple[Batch, Batch]]
"""One task: `sample(generator, split) -> ((x, y) of the support, (x, y) of the query)`."""


def from_function(sample: Sample, splits: Sequence[str] = ("train", "val", "test"), name: str = "function") -> FunctionTasks:
    """A task family from a function that samples one task; it is called once per task, T times.

    All randomness must come from the generator, which is seeded from (seed, split, episode): then an episode
    is the same in every run. Keeping the classes of the splits apart is up to the function.

    Args:
        sample: `sample(generator, split)` returns one task's support and query: tensors ((x, y), (x, y)).
        splits: The splits that the function knows.
        name: A name for records.
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
        seeds = raw(seed, f"function/{split}", start, count, 1)[:, 0] >> 1  # torch takes no seed of 64 bits
        episodes = [self._flat(self.function(torch.Generator().manual_seed(int(s)), split)) for s in seeds]
        for i, episode in enumerate(episodes):
            if (found := _shapes(episode)) != (expected := _shapes(episodes[0])):
                raise ValueError(
                    f"`{self.name}` gave tensors of shapes {found} for episode {start + i}, but {expected} "
                    f"for episode {start}; all tasks of a family must have the same shapes."
                )
        xs, ys, xq, yq = (torch.stack(tensors) for tensors in zip(*episodes, strict=True))
        return Task((xs, ys), (xq, yq))

    def describe(self, split: str) -> dict[str, Any]:
        """Family and split; what the function does is known to its author only."""
        check_split(split, self.splits)
        return {"family": self.name, "options": {}, "split": split}

    def _flat(self, task: Any) -> list[Tensor]:
        match task:
            case (Tensor() as xs, Tensor() as ys), (Tensor() as xq, Tensor() as yq):
                pairs = {"support": (xs, ys), "query": (xq, yq)}
            case _:
                raise ValueError(
                    f"`{self.name}` returned {_kind(task)}; it must return ((x, y), (x, y)): the "
                    "support and the query of one task, as tensors."
                )
        for part, (x, y) in pairs.items():
            if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
                raise ValueError(
                    f"`{self.name}` returned a {part} of {tuple(x.shape)} inputs and {tuple(y.shape)} targets; "
                    "the first axis of both must count the same examples, one or more."
                )
        return [xs, ys, xq, yq]


def _shapes(tensors: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__
