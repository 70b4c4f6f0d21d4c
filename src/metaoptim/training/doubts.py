"""What makes a hypergradient wrong though nothing fails: losses that read something else, and runs that went nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.finite import odd_place
from metaoptim.core.gradients import held
from metaoptim.core.types import Batch, Estimate, Learner, MetaOptimizer, MetaParams, Params, State, Task
from metaoptim.engine.bound import Bound
from metaoptim.estimators import FiniteDifferences, Implicit
from metaoptim.training.bilevel import PREFIX

FAR, NEAR = 0.1, 0.01  # a slope at a minimum is below: of that at the start; of the loss, times the length of the weights
LONGER, LARGER = 10, 100  # times: weights, and a val_loss, at the end of a training that diverged


@torch.enable_grad()
def check_read(problem: MetaOptimizer, task: Task, key: Tensor, twice: bool) -> None:
    """A ValueError where a loss does not depend on its weights, or neither of both on a hyper-parameter.

    key: the task's own, for noise. twice: whether the training loss has second derivatives, which tell whether its gradient
    depends on a hyper-parameter.
    """
    by_values = isinstance(problem.estimator, FiniteDifferences)  # to which it is all one how a value came about
    phi, fixed = problem.split(trees.map_tensors(lambda x: x.detach().requires_grad_(), problem.phi))
    learner, k = Bound(problem.learner, fixed, key), torch.zeros_like(key)
    state = learner.init(phi, task.support)
    f, x = learner.inner(phi, state, task.support, k)
    train, val = f(x)[0], learner.loss(phi, state, task.support, task.query, k)[0]
    slopes = _slopes([train], x, twice)
    for name, reached in (("train_loss", slopes), ("val_loss", by_values or _slopes([val], x))):
        if not reached:
            raise ValueError(
                f"{name} does not depend on the weights that it is given: it must compute with its first argument, not with a "
                "module or tensors from outside, by operations that have a derivative."
            )
    through = _slopes(list(slopes.values()) if twice else [train], phi.weights)
    read = through.keys() | _slopes([val], phi.weights).keys()
    if not by_values and (unread := [n.removeprefix(PREFIX) for n in phi.weights if n not in read]):
        raise ValueError(
            f"the hyper-parameter `{unread[0]}` has no influence: neither val_loss nor the gradient of train_loss depends on "
            "it; compute with the tensors that a loss is given, without .item() or detach, or leave it out."
        )


def check_start(start: Any, expected: State) -> None:
    """A ValueError for what is not the `end` of a run of the same weights and rule."""
    if start is None:
        return
    if not isinstance(start, tuple) or len(start) != 2 or type(start[1]) is not type(expected):
        raise ValueError(f"start is {type(start).__name__}: it must be the `end` of an earlier result, as in start=found.end.")
    there, here = ({n: tuple(x.shape) for n, x in trees.named(state).items()} for state in (start[1], expected))
    if odd := [n for n in here | there if there.get(n) != here.get(n)]:
        part, *path = json.loads(odd[0])
        name = f"{'the state of the rule for ' if part else ''}`{'.'.join(map(str, path))}`"
        raise ValueError(
            f"start is the end of another problem: {name} is {there.get(odd[0], 'missing')} in it and "
            f"{here.get(odd[0], 'missing')} here; go on with the same weights and rule, or leave start out."
        )


def doubts(
    problem: MetaOptimizer,
    learner: Learner,
    learnt: MetaParams,
    task: Task,
    end: State,
    found: Estimate,
    given: Mapping[str, Batch],
) -> Iterator[str]:
    """A sentence on each thing that makes a hypergradient worth nothing.

    learner: that of the run, from its start to its end. given: the data by the names that the user knows.
    """
    first, last = (torch.tensor(k, device=found.loss.device) for k in (0, learner.steps))
    start = learner.init(learnt, task.support)
    hyper = {n.removeprefix(PREFIX): g for n, g in found.grad.weights.items()}
    slopes = {"val_loss": found.loss, **hyper, **found.grad.rule}
    odd = [n for n, g in slopes.items() if not g.isfinite().all()]
    if odd or trees.norm(learner.weights(learnt, end)) > LONGER * trees.norm(learner.weights(learnt, start)):
        if places := [f"{name} has {place}" for name, data in given.items() if (place := odd_place(data))]:
            yield f"{places[0]}, with which no hypergradient can be right."
            return
        at_start = learner.loss(learnt, start, task.support, task.query, first)[0]
        if odd or found.loss > LARGER * at_start.abs():
            what = f", and its gradient in `{odd[0]}` is not finite" if odd and odd[0] != "val_loss" else ""
            yield (
                f"val_loss was {at_start:.3g} before the first step and is {found.loss:.3g} after {learner.steps}{what}: the "
                f"training diverged{', or a loss has no finite slope' if odd else ''}; take smaller steps or fewer."
            )
            return
    if zero := [n for n, g in hyper.items() if learner.steps and not g.any()]:
        yield (
            f"the gradient in the hyper-parameter `{zero[0]}` is 0 throughout: no loss changes with it here; compute with the "
            "tensors that a loss is given, or leave it out."
        )
    if isinstance(problem.estimator, Implicit):
        (before, _), (after, room) = (_steep(learner, learnt, s, task, k) for s, k in ((start, first), (end, last)))
        if after > FAR * before and room > NEAR:
            yield (
                "an implicit gradient is that at a minimum, and the training is not at one: the gradient of train_loss has the "
                f"length {after:.3g} after {learner.steps} steps, and had {before:.3g} before the first; take more steps or "
                "larger ones, or method='exact'."
            )


def _steep(learner: Learner, phi: MetaParams, state: State, task: Task, k: Tensor) -> tuple[float, float]:
    """The length of the inner gradient; and its share of the loss, times the length of the weights."""
    f, x = learner.inner(phi, state, task.support, k)
    slope, loss = held(f, x)
    length = trees.norm(slope).item()
    return length, length * trees.norm(x).item() / (abs(loss.item()) + 1e-30)


def _slopes(ys: list[Tensor], xs: Params, again: bool = False) -> Params:
    """The gradients of the sum of all numbers, of those tensors alone on which they depend."""
    reached = [y.sum() for y in ys if y.requires_grad]
    if not reached or not xs:
        return {}
    total, at = torch.stack(reached).sum(), list(xs.values())
    found = torch.autograd.grad(total, at, create_graph=again, retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(xs, found, strict=True) if g is not None}
