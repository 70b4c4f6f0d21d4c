"""Batches that can be computed with, and are hardly what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.callers import warn
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine.executor import tasks_of

CHANCE = 1e-9  # that what is seen is one


def look_at(method: MetaOptimizer, batch: Any) -> None:
    """Warns of what is hardly meant in the first batch of a training.

    Raises a ValueError for no batch of tasks, and where one classifier of all training classes is given tasks that number
    their classes anew.
    """
    batch = tasks_of(batch)
    classes, labels = getattr(getattr(method.learner, "pooled", None), "classes", None), _labels(batch)
    if classes is not None and labels is not None and _anew(labels, classes):
        raise ValueError(
            f"{method.name} trains one classifier of all training classes (classes={classes}), and the targets of each task "
            f"are 0 to {labels.max()}: where these are the same classes in every task, set classes={labels.max() + 1}; where "
            "each task numbers its own, train on an image family with mo.train, or take joint."
        )
    for doubt in doubts(batch):
        warn(doubt)


def doubts(batch: Task) -> Iterator[str]:
    """A sentence on each thing in a batch of tasks that is hardly meant."""
    leaves = [x for pair in _pairs(batch) for x in pair]
    if leaves and all(x.is_floating_point() and x.shape[1:] == (1,) for x in leaves) and len(leaves[0]) > 1:
        count = len(leaves[0])
        yield (
            f"inputs and targets have the shape {tuple(leaves[0].shape)}, which is {count} tasks of one example, each a single "
            f"number; if they are one task of {count} examples, give x[None] and y[None], with a leading axis T = 1."
        )
    labels = _labels(batch)
    if labels is not None and 0.5 ** labels.numel() < CHANCE and (labels == labels[0, 0]).all():
        yield f"every target is {labels[0, 0]}: with one class there is nothing to tell apart, and a constant scores best."


def _anew(labels: Tensor, classes: int) -> bool:
    """Whether each of several tasks has the classes 0 … N−1 alone, which as classes of all tasks would hardly be drawn."""
    seen = [torch.unique(own) for own in labels]
    numbered = torch.arange(len(seen[0]), device=labels.device)
    rare = (len(numbered) / classes) ** labels.numel() < CHANCE
    return rare and len(seen) > 1 and all(torch.equal(own, numbered) for own in seen)


def _labels(batch: Task) -> Tensor | None:
    """The targets of each task (T, …), if they are class numbers."""
    targets = [y for _, y in _pairs(batch)]
    if not targets or any(y.dtype != torch.int64 or y.ndim < 2 or not y.numel() or len(y) != len(targets[0]) for y in targets):
        return None
    return torch.cat([y.flatten(1) for y in targets], 1)


def _pairs(batch: Task) -> list[tuple[Tensor, Tensor]]:
    """Support and query, where both are pairs of tensors."""
    pairs = [(part[0], part[1]) for part in batch if isinstance(part, tuple | list) and len(part) == 2]
    return pairs if len(pairs) == 2 and all(isinstance(x, Tensor) for pair in pairs for x in pair) else []
