"""Adapts to a batch of tasks and says how each does on its query set after every inner step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Carry, Meta, MetaOptimizer, Params, State, Task
from metaoptim.engine.executor import explained
from metaoptim.engine.options import cut


def rest(carry: Carry) -> Carry:
    """The carry from which a new task starts: the mean over the task slots of training."""
    return trees.map_tensors(lambda x: x.mean(0), carry)


def adapt(optimizer: MetaOptimizer, meta: Meta, support: Batch, memory: Carry, steps: int) -> Params:
    """All weights after `steps` inner steps on one task's support set (S, …); `memory` as of `rest`."""
    with explained(support, optimizer), torch.no_grad():
        state = optimizer.estimator.start(optimizer.learner, meta, support, memory)
        for k in range(steps):
            state = optimizer.learner.step(meta, state, support, k, gradients.outermost)
        return optimizer.learner.weights(meta, state)


def rollout(
    optimizer: MetaOptimizer, meta: Meta, batch: Task, memory: Carry, steps: int, tasks: str = "loop"
) -> dict[str, Tensor]:
    """Loss and metrics on the query set after 0 … K steps: each a tensor (T, K+1).

    `memory` is shared by all tasks (see `rest`); tasks: as in `Engine`, of which
    the mapping counts here, and not the threads.
    """
    learner = optimizer.learner

    def judged(state: State, task: Task, k: int) -> dict[str, Tensor]:
        loss, info = learner.loss(meta, state, task.query, k)
        return {"loss": loss, **info}

    def one(task: Task) -> dict[str, Tensor]:
        state = optimizer.estimator.start(learner, meta, task.support, memory)
        scores = [judged(state, task, 0)]
        for k in range(steps):
            state = learner.step(meta, state, task.support, k, gradients.outermost)
            scores.append(judged(state, task, k + 1))
        return cast(dict[str, Tensor], trees.stack(scores))

    with explained(batch, optimizer), torch.no_grad():
        how = cut(tasks)
        if not how.vmapped:
            return cast(dict[str, Tensor], trees.stack([one(trees.index(batch, t)) for t in range(batch.query[0].shape[0])]))
        return vmap(one, randomness="different", chunk_size=how.size)(batch)
