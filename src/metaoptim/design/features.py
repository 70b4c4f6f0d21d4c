"""What a task family is like, in a dozen numbers that cost seconds: nothing is trained.

All of them come from some episodes of the training split. Inputs are flattened, centred, and divided by one number, so that
nothing depends on the place and the unit of x; nothing does on those of a regression's y either. A network is wanted in two of
them: one hidden layer of tanh, the same weights at every call, in the parametrisation of Jacot, Gabriel and Hongler 2018
(arXiv 1806.07572), where step sizes need not know the size of x.

Groups of such features, and their names, are those of Vanschoren 2018 (arXiv 1810.03548, table 1): simple ones, statistical
ones, and landmarkers, which are scores of quick learners.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metaoptim.core.checks import check_counts
from metaoptim.core.types import Batch
from metaoptim.tasks import TaskFamily

EPISODES, HIDDEN, STEP, RIDGE = 64, 32, 0.5, 0.1
Features = dict[str, float]


class _Episodes(NamedTuple):
    """x [T, S, D] and y of support and query; classes [T, S, N] as one-hot rows, values [T, S, M]."""

    support: Tensor
    of_support: Tensor
    query: Tensor
    of_query: Tensor
    classes: bool


def features(tasks: TaskFamily, *, episodes: int = EPISODES, seed: int = 0) -> Features:
    """Describes a family by episodes 0 … `episodes` − 1 of the stream (seed, "train"); the same call gives the same numbers.

    - `classification`: 1 for classes, 0 for values.
    - `ways`, `shots`, `queries`: N, and examples of each class (N = 1 for values).
    - `inputs`: log10 of the numbers in one x. `channels`: of images (C, H, W), else 1.
    - `separability`, `centroid`, `linear`, `alignment`, `step`: see the functions of these names.

    Errors: ValueError for tasks that aren't pairs (x, y) of tensors, or whose values all equal.
    """
    check_counts(2, episodes=episodes)
    task = tasks.sample("train", seed=seed, start=0, count=episodes)
    (xs, ys), (xq, yq) = _pair(task.support), _pair(task.query)
    found = _prepared(xs, ys, xq, yq)
    ways = found.of_support.shape[-1] if found.classes else 1
    per_image = xs.shape[2] if xs.ndim == 5 else 1  # [T, S, C, H, W]
    gradients, ratio = _first_step(found)
    return {
        "classification": float(found.classes),
        "ways": float(ways),
        "shots": xs.shape[1] / ways,
        "queries": xq.shape[1] / ways,
        "inputs": math.log10(found.support.shape[-1]),
        "channels": float(per_image),
        "separability": separability(*_groups(found)),
        "centroid": centroid(found),
        "linear": linear(found),
        "alignment": alignment(gradients),
        "step": math.log(max(ratio, 1e-6)),
    }


def separability(x: Tensor, groups: Tensor) -> float:
    """The share of the scatter that lies between groups, 1 − (W / (n − N)) / (S / (n − 1)): 1 where groups are points.

    W is the squared distance to the group's mean, summed, S that to the mean of all; about 0 for groups that mean nothing (the
    divisors see to that; this is the ε² of Kelley 1935). x [T, n, D], groups [T, n, N] as one-hot rows; the mean over T. For
    values it is asked of y, with tasks as groups: how much tasks differ in level.
    """
    count = groups.sum(1, keepdim=True).mT  # [T, N, 1]
    means = groups.mT @ x / count.clamp(min=1)
    within = (x - groups @ means).square().sum((1, 2))
    total = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    n, there = x.shape[1], (count > 0).sum((1, 2))
    share = 1 - (within / (n - there).clamp(min=1)) / (total / (n - 1)).clamp(min=1e-30)
    return float(torch.where(total > 0, share, torch.zeros_like(share)).mean())


def centroid(found: _Episodes) -> float:
    """What the nearest class mean of the raw inputs tells, from 0 (chance) to 1 (all): (accuracy − 1/N) / (1 − 1/N).

    For values: what the mean of the support's y tells of the query's, 1 − Σ(ȳ_S − y)² / Σ y², with y centred over all tasks.
    """
    if not found.classes:
        guess = found.of_support.mean(1, keepdim=True).expand_as(found.of_query)
        return _explained(guess, found.of_query)
    count = found.of_support.sum(1).unsqueeze(-1)
    means = found.of_support.mT @ found.support / count.clamp(min=1)
    distance = torch.cdist(found.query, means).masked_fill((count == 0).mT, math.inf)
    return _above_chance(-distance, found.of_query)


def linear(found: _Episodes) -> float:
    """What ridge regression from the raw inputs tells of the query, on the scales of `centroid`: a linear probe.

    λ = 0.1 times the mean of the kernel's diagonal, so that the unit of x is no matter; classes are fitted as one-hot rows
    (Rifkin, Yeo and Poggio 2003, regularised least-squares classification).
    """
    centre, level = found.support.mean(1, keepdim=True), found.of_support.mean(1, keepdim=True)
    x, y = found.support - centre, found.of_support - level
    kernel = x @ x.mT
    weight = kernel.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12) * RIDGE
    dual = torch.linalg.solve(kernel + weight[:, None, None] * torch.eye(x.shape[1], dtype=x.dtype), y)
    guess = level + (found.query - centre) @ (x.mT @ dual)
    return _above_chance(guess, found.of_query) if found.classes else _explained(guess, found.of_query)


def alignment(gradients: Tensor) -> float:
    """The mean cosine of the gradients of two tasks at one start, ∇_θ L(θ_0; S_i), over all pairs: 1 where tasks are the same.

    gradients [T, P]. Where it is low, no start serves all without adapting (Yu et al. 2020, arXiv 2001.06782, on conflicts).
    """
    unit = functional.normalize(gradients, dim=1)
    number = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (number * (number - 1)))


def _first_step(found: _Episodes) -> tuple[Tensor, float]:
    """∇_θ L(θ_0; S_i) of each task, [T, P], and `step`: mean_i L(θ_i; Q_i) / mean_i L(θ_0; Q_i), after one step of size 0.5.

    Its log is below 0 where one step on the support helps on the query.
    """
    inputs, outputs = found.support.shape[-1], found.of_support.shape[-1]
    generator = torch.Generator().manual_seed(0)
    shapes = ((HIDDEN, inputs), (HIDDEN,), (outputs, HIDDEN), (outputs,))
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    rows, before, after = [], 0.0, 0.0
    for xs, ys, xq, yq in zip(*found[:4], strict=True):
        weights = [w.clone().requires_grad_() for w in start]
        grads = torch.autograd.grad(_loss(weights, xs, ys, found.classes), weights)
        moved = [w.detach() - STEP * g for w, g in zip(weights, grads, strict=True)]
        rows.append(torch.cat([g.flatten() for g in grads]))
        before += _loss(start, xq, yq, found.classes).item()
        after += _loss(moved, xq, yq, found.classes).item()
    return torch.stack(rows), after / max(before, 1e-30)


def _loss(weights: list[Tensor], x: Tensor, y: Tensor, classes: bool) -> Tensor:
    first, bias, second, level = weights
    hidden = torch.tanh(x @ first.T / math.sqrt(x.shape[-1]) + bias)
    out = hidden @ second.T / math.sqrt(HIDDEN) + level
    return functional.cross_entropy(out, y) if classes else functional.mse_loss(out, y)


def _prepared(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> _Episodes:
    support, query = (x.reshape(*x.shape[:2], -1).double() for x in (xs, xq))
    centre = support.mean((0, 1))
    spread = (support - centre).square().mean().sqrt().clamp(min=1e-12)
    support, query = (support - centre) / spread, (query - centre) / spread
    if not ys.is_floating_point():
        ways = int(max(ys.max(), yq.max())) + 1
        of_support, of_query = (functional.one_hot(y.long(), ways).double() for y in (ys, yq))
        return _Episodes(support, of_support, query, of_query, True)
    of_support, of_query = (y.reshape(*y.shape[:2], -1).double() for y in (ys, yq))
    level = of_support.mean((0, 1))
    width = (of_support - level).square().mean().sqrt()
    if width == 0:
        raise ValueError("all values of these tasks are the same, so that there is nothing to learn; look at their y.")
    return _Episodes(support, (of_support - level) / width, query, (of_query - level) / width, False)


def _groups(found: _Episodes) -> tuple[Tensor, Tensor]:
    """What `separability` is asked of: all inputs of an episode, and their classes; or all y at once, and their tasks."""
    y = torch.cat([found.of_support, found.of_query], 1)
    if found.classes:
        return torch.cat([found.support, found.query], 1), y
    number, each = y.shape[:2]
    return y.reshape(1, number * each, -1), torch.eye(number, dtype=y.dtype).repeat_interleave(each, 0)[None]


def _above_chance(scores: Tensor, classes: Tensor) -> float:
    chance = 1 / classes.shape[-1]
    right = (scores.argmax(-1) == classes.argmax(-1)).double().mean().item()
    return (right - chance) / (1 - chance) if chance < 1 else 1.0


def _explained(guess: Tensor, y: Tensor) -> float:
    """R², and −1 for whatever is worse than that."""
    return max(-1.0, 1 - float((guess - y).square().sum() / y.square().sum().clamp(min=1e-30)))


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) and x.ndim >= 2 for x in batch):
        return batch[0], batch[1]
    raise ValueError(f"features of tasks are read from pairs (x, y) of tensors; an episode holds {type(batch).__name__}.")
