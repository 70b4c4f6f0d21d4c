"""Does it matter which class is given to which output? The same episodes under other assignments of classes to outputs.

Before adaptation an output means nothing, so the score depends on the assignment; after it, it should not. Ye and Chao 2022,
https://arxiv.org/abs/2106.16245. Threshold: a spread of 2 points of accuracy, which is the standard deviation over the
assignments of one episode, averaged over episodes.
"""

from __future__ import annotations

from itertools import permutations
from math import factorial
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.types import Task
from metaoptim.diagnosis.subject import Change, Numbers, Subject
from metaoptim.evaluation.baselines import has_classes

ASSIGNMENTS = 8
MATTERS = 0.02


def measure(subject: Subject) -> Numbers:
    """The accuracy of the same episodes under each assignment, before and after adaptation."""
    if subject.result.metric != "accuracy" or not has_classes(subject.batch):
        raise ValueError("the tasks have no classes that could be given to other outputs.")
    classes = int(max(part[1].max() for part in subject.batch)) + 1
    chosen = assignments(classes)
    found = [subject.judged(assigned(order), subject.closely).rows[0].scores["accuracy"].double() for order in chosen]
    scores = torch.stack(found)  # (P, T, K+1)
    return {
        "assignments": len(chosen),
        "classes": classes,
        "episodes": subject.closely,
        "before": _spread(scores[..., 0]) if subject.adapts else None,
        "after": _spread(scores[..., -1]),
    }


def assignments(classes: int) -> list[tuple[int, ...]]:
    """A few orders of 0 … N−1, the usual one first; all of them where there are no more."""
    if factorial(min(classes, ASSIGNMENTS)) <= ASSIGNMENTS:
        return list(permutations(range(classes)))
    draw = torch.Generator().manual_seed(0)
    found = {tuple(range(classes)): None}
    while len(found) < ASSIGNMENTS:
        found[tuple(torch.randperm(classes, generator=draw, device=draw.device).tolist())] = None
    return list(found)


def assigned(order: tuple[int, ...]) -> Change:
    """Class c is given to output order[c], in the support and in the query; negative targets, which losses pass over, stay."""

    def relabelled(y: Tensor) -> Tensor:
        outputs = torch.tensor(order, device=y.device)
        return torch.where(y >= 0, outputs[y.clamp(0, len(order) - 1)], y)

    def change(batch: Task, split: str, seed: int, start: int) -> Task:
        return Task(*((x, relabelled(y)) for x, y in batch))

    return change


def _spread(scores: Tensor) -> dict[str, Any]:
    """Of accuracies (P, T) under P assignments of T episodes."""
    return {
        "means": scores.mean(1).tolist(),
        "spread": scores.std(0, correction=0).mean().item(),
        "worst": scores.amin(0).mean().item(),
        "best": scores.amax(0).mean().item(),
    }


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    after, before = numbers["after"], numbers["before"]
    matters = "matters" if after["spread"] >= MATTERS else "hardly matters"
    ends = f"from {100 * after['worst']:.1f} to {100 * after['best']:.1f} %"
    earlier = f" (before: {100 * before['spread']:.1f})" if before else ""
    return (
        f"Which class is given to which output {matters}: over {numbers['assignments']} assignments the accuracy of an episode "
        f"goes {ends}, a spread of {100 * after['spread']:.1f} points{earlier}."
    )
