"""A task family from any function that samples one task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_called
from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import check_split, raw

OTHER = 1_793_205_637  # a seed that nobody else takes
FEW = 4  # parts of what a function returned that a sentence names

Sample = Callable[[torch.Generator, str], tuple[Batch, Batch]]
"""One task: `sample(generator, split) -> ((x, y) of the support, (x, y) of the query)`, or other trees of tensors."""


def from_function(sample: Sample, splits: Sequence[str] = ("train", "val", "test"), name: str = "function") -> FunctionTasks:
    """A task family from a function that samples one task; it is called once per task, T times.

    All randomness must come from the generator, which is seeded from (seed, split, episode). Then an episode
    is the same in every run; the first one of each split is drawn twice, to see that it is. The function itself
    must keep the classes of the splits apart.

    Args:
        sample: `sample(generator, split)` returns one task's support and query: tensors ((x, y), (x, y)), or dicts of them.
        splits: The splits that the function knows.
        name: The family's name, for records.
    """
    check_called("sample", sample, "generator", "split")
    return FunctionTasks(sample, tuple(splits), name)


@dataclass(frozen=True)
class FunctionTasks:
    """The family that `from_function` builds; its fields are that function's arguments."""

    function: Sample
    splits: tuple[str, ...]
    name: str
    repeated: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # splits seen to give a task again

    def __repr__(self) -> str:
        known = "" if self.splits == ("train", "val", "test") else f", splits={self.splits}"
        return f"from_function({getattr(self.function, '__name__', type(self.function).__name__)}{known}, name={self.name!r})"

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        check_split(split, self.splits)
        seeds = raw(seed, f"function/{split}", start, count, 1)[:, 0] >> 1  # torch takes no 64-bit seeds
        episodes = [self._drawn(int(s), split) for s in seeds]
        for i, episode in enumerate(episodes):
            if (found := _shapes(episode)) != (expected := _shapes(episodes[0])):
                raise ValueError(
                    f"`{self.name}` gave tensors of shapes {found} for episode {start + i}, but {expected} "
                    f"for episode {start}; all tasks of a family must have the same shapes."
                )
        if split not in self.repeated:
            with other_generators():
                again = self._drawn(int(seeds[0]), split)
            self._check_same(episodes[0], again, f"episode {start} of split {split!r}")
            self.repeated.add(split)
        batch: Task = trees.stack(episodes)
        return batch

    def describe(self, split: str) -> dict[str, Any]:
        """Family and split; only its author knows what the function does."""
        check_split(split, self.splits)
        return {"family": self.name, "options": {}, "split": split}

    def _drawn(self, seed: int, split: str) -> Task:
        return self._checked(self.function(torch.Generator().manual_seed(seed), split))

    def _check_same(self, first: Task, again: Task, what: str) -> None:
        """Raises a ValueError where the same generator gave two tasks."""
        pairs = zip(trees.flatten(first), trees.flatten(again), strict=False)
        if _shapes(first) == _shapes(again) and all(torch.equal(*map(torch.nan_to_num, pair)) for pair in pairs):
            return
        raise ValueError(
            f"`{self.name}` gave two different tasks for {what} from one generator: draw every random number from the "
            "generator that it is given, as in torch.rand(5, generator=generator); seed numpy's with generator.initial_seed()."
        )

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


@contextmanager
def other_generators() -> Iterator[None]:
    """Inside, the generators that a sampler must not draw from give other numbers; outside, they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(OTHER)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _tensors_alone(tree: Any) -> bool:
    return all(isinstance(x, Tensor) for x in trees.flatten(tree))


def _shapes(task: Task) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in trees.flatten(task))


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join([*map(_kind, value[:FEW]), *['…'] * (len(value) > FEW)])})"
    return type(value).__name__
