"""THE inner loop: training, evaluation, adaptation, displacement and evolution strategies are ways of reading it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Batch, Gradient, Learner, MetaParams, State


def one_step(learner: Learner, phi: MetaParams, state: State, support: Batch, k: Tensor, gradient: Gradient) -> State:
    """s_{k+1}. A step without a point to differentiate at, as a closed form's, is given no gradient and a loss of 0."""
    f, x = learner.inner(phi, state, support, k)
    grads, loss = gradient(f, x) if x else ({}, torch.zeros((), device=k.device))
    return learner.apply(phi, state, grads, loss, k)


def inner_loop(
    learner: Learner,
    phi: MetaParams,
    support: Batch,
    gradient: Gradient,
    steps: int | None = None,
    start: tuple[Tensor, State] | None = None,
) -> Iterator[tuple[Tensor, State]]:
    """Yields (k, s_k) for the start and after each step.

    k is a tensor (0-dim int64) on the device of the data, so that what is traced for one step serves all.

    Args:
        gradient: how the inner gradient is taken (see `gradients`).
        steps: how many; the learner's own K where not given.
        start: (k, s_k) of a run to go on with; s_0 where not given.
    """
    device = trees.device((support, phi))
    k, state = start or (torch.tensor(0, device=device), learner.init(phi, support))
    yield k, state
    for i in range(learner.steps if steps is None else steps):
        now = torch.tensor(i, device=device) if start is None else k + i
        state = one_step(learner, phi, state, support, now, gradient)
        yield now + 1, state
