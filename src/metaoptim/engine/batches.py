"""Batches that can be computed with, and are hardly what was meant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metaoptim.core.types import MetaOptimizer, Task

CHANCE = 1e-9  # that what is seen is one


def check_classes(method: MetaOptimizer, batch: Task) -> None:
    """A ValueError where one classifier of all training classes is given tasks that number their classes anew."""
    classes = getattr(getattr(method.learner, "pooled", None), "classes", None)
    if classes is None or (labels := _labels(batch)) is None:
        return
    seen = torch.unique(labels)
    if labels.min() == 0 and labels.max() + 1 == len(seen) and (len(seen) / classes) ** len(labels) < CHANCE:
        raise ValueError(
            f"{method.name} trains one classifier of all {classes} training classes, and these tasks number their classes "
            f"anew, from 0 to {len(seen) - 1}: give targets that are the same class in every task, train on an image family "
            "with mo.train, or take joint."
        )


def doubts(batch: Task) -> Iterator[str]:
    """A sentence on each thing in a batch of tasks that is hardly meant."""
    leaves = [x for pair in _pairs(batch) for x in pair]
    if leaves and len(leaves[0]) > 1 and all(x.is_floating_point() and x.shape[1:] == (1,) for x in leaves):
        count = len(leaves[0])
        yield (
            f"inputs and targets have the shape {tuple(leaves[0].shape)}, which is {count} tasks of one example, each a single "
            f"number; if they are one task of {count} examples, give x[None] and y[None], with a leading axis T = 1."
        )
    labels = _labels(batch)
    if labels is not None and 0.5 ** len(labels) < CHANCE and (labels == labels[0]).all():
        yield f"every target is {labels[0]}: with one class there is nothing to tell apart, and a constant has the best score."


def _labels(batch: Task) -> Tensor | None:
    """All targets of a batch, if they are class numbers."""
    targets = [y.flatten() for _, y in _pairs(batch)]
    return torch.cat(targets) if targets and all(y.dtype == torch.int64 for y in targets) else None


def _pairs(batch: Task) -> list[tuple[Tensor, Tensor]]:
    """Support and query, where both are pairs of tensors."""
    pairs = [(part[0], part[1]) for part in batch if isinstance(part, tuple | list) and len(part) == 2]
    return pairs if len(pairs) == 2 and all(isinstance(x, Tensor) for pair in pairs for x in pair) else []
