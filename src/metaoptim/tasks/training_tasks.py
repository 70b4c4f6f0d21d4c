"""Training tasks that come again, for methods that learn something of each: examples of T of them, with their numbers."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from metaoptim.core import trees
from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import choose, uniforms


@runtime_checkable
class HasTrainingTasks(Protocol):
    """What a family has besides if its split "train" is made of tasks that can be told apart: alphabets, or countries."""

    def training_tasks(self) -> tuple[int | None, int | None]:
        """How many there are (None: as many as are wanted), and the classes of the largest (None: targets are no classes)."""
        ...

    def of_training_tasks(self, which: NDArray[np.intp], rows: int, *, seed: int, start: int) -> Batch:
        """x [T, rows, …], y [T, rows, …]: examples of T training tasks by their numbers, drawn with replacement.

        They are items start … start+T−1 of a stream of the seed.
        """
        ...


def check_heads(tasks: Any, heads: int, outputs: int | None) -> None:
    """A ValueError for a family without training tasks, or one that has others than these heads are for."""
    if not isinstance(tasks, HasTrainingTasks):
        raise ValueError(
            "a head for each training task needs training tasks that come again, and this family draws new ones: train with "
            "omniglot, glyphs, fertility, from_table or sinusoid, or take joint."
        )
    found, classes = tasks.training_tasks()
    for name, here, there in (("heads", heads, found), ("outputs", outputs, classes)):
        if there is not None and here != there:
            raise ValueError(
                f"the method was built with {name}={here}, and the tasks have {there}: set {name}={there} (in a recipe: "
                f"algorithm.{name}={there})."
            )


def numbered(tasks: Any, heads: int, *, seed: int, step: int, count: int) -> Task:
    """T batches (x, y, number) of step `step`, each of another training task while there are as many; as large as episodes."""
    support, query = (trees.flatten(part)[0].shape[1] for part in tasks.sample("train", seed=seed, start=0, count=1))
    order = choose(uniforms(seed, "training tasks/order", step, 1, heads), heads)[0]
    which = np.resize(order, count)  # once more from the first, where there are fewer than T
    x, y = tasks.of_training_tasks(which, support + query, seed=seed, start=step * count)
    number = torch.from_numpy(which)[:, None].expand(-1, support + query).clone()
    parts = (x, y, number)
    return Task(tuple(p[:, :support] for p in parts), tuple(p[:, support:] for p in parts))
