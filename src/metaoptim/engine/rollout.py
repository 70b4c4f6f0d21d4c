"""Adapts to a batch of tasks and says how each does on its query set after every inner step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Batch, Carry, MetaOptimizer, MetaParams, Params, State, Task
from metaoptim.engine.executor import count_tasks
from metaoptim.engine.faults import explained
from metaoptim.engine.inspect import untouched
from metaoptim.engine.options import cut


def heritage(method: MetaOptimizer, carry: Carry) -> Params:
    """What a new task starts from, by name: the mean over the task slots of training ({}: nothing)."""
    return trees.named(trees.map_tensors(lambda x: x.mean(0), method.estimator.inherit(carry)))


def start(method: MetaOptimizer, phi: MetaParams, support: Batch, inherited: Params) -> tuple[Tensor, State]:
    """(0, s_0) of a new task; `inherited` as of `heritage`."""
    learner = method.learner
    state = learner.init(phi, support)
    if inherited:
        state = learner.inherit(state, trees.filled(learner.heritage(state), inherited))
    return torch.tensor(0, device=trees.device(support)), state


def adapt(method: MetaOptimizer, phi: MetaParams, support: Batch, inherited: Params, steps: int) -> tuple[Tensor, State]:
    """(K, s_K) after `steps` inner steps on one task's support set (S, …)."""
    data = {"inputs and targets of one task's support set, with axes (S, …)": support}
    with explained(data, method), torch.no_grad(), untouched(phi) as own:
        *_, end = inner_loop(method.learner, own, support, held, steps, start(method, own, support, inherited))
        return end


def rollout(
    method: MetaOptimizer, phi: MetaParams, batch: Task, inherited: Params, steps: int, batching: str = "loop"
) -> dict[str, Tensor]:
    """Loss and metrics on the query set after 0 … K steps: each a tensor (T, K+1).

    All tasks start from the same `inherited`; batching: as in `Engine`, of which the mapping counts here, and not the threads.
    """
    learner = method.learner

    with explained(batch, method), torch.no_grad(), untouched(phi) as own:

        def one(task: Task) -> dict[str, Tensor]:
            scores = []
            for k, state in inner_loop(learner, own, task.support, held, steps, start(method, own, task.support, inherited)):
                loss, info = learner.loss(own, state, task.support, task.query, k)
                scores.append({"loss": loss, **info})
            return cast(dict[str, Tensor], trees.stack(scores))

        how = cut(batching)
        if not how.vmapped:
            return cast(dict[str, Tensor], trees.stack([one(trees.index(batch, t)) for t in range(count_tasks(batch))]))
        return vmap(one, randomness="different", chunk_size=how.size)(batch)
