"""The way that is taken where nobody asked for one: by rule, with nothing timed.

The same program computes the same floats whenever it runs on a machine, and its first gradient comes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.gradients import autograd, exact
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import MetaOptimizer, MetaParams, Task
from metaoptim.engine.bound import Bound
from metaoptim.engine.executor import count_tasks, keys
from metaoptim.engine.options import Choice, cut
from metaoptim.engine.reducer import Reducer
from metaoptim.learners import network_of

SMALL = (
    1_000_000  # multiplications of one task's forward pass up to which calling torch costs more than computing (docs/log.md)
)
FEW = 3  # tasks up to which a map does not pay for itself
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LARGE = (*_CONVOLUTIONS, nn.RNNBase, nn.MultiheadAttention)  # whose weights are used many times in a forward pass


def by_rule(method: MetaOptimizer, phi: MetaParams, batch: Task, settings: Sequence[str], budget: int) -> Choice:
    """Fills in what is "auto": vmap for small models and many tasks, else the loop; the graph while it fits the budget."""
    batching, memory, runtime = settings
    if batching == "auto":
        batching = "vmap" if count_tasks(batch) > FEW and small(method, phi, batch) else "loop"
    if memory == "auto":
        memory = method.estimator.memories[0]
        if memory == "graph" and "steps" in method.estimator.memories and method.learner.steps > 1:
            size, workers = cut(batching).size, cut(batching).workers
            at_once = min(count_tasks(batch), (size or count_tasks(batch)) * workers)
            beside = Reducer(method).bytes(phi, count_tasks(batch))
            if beside + at_once * method.learner.steps * one_step(method, phi, batch) > budget:
                memory = "steps"
    return Choice(batching, memory, "eager" if runtime == "auto" else runtime, by="rule")


def small(method: MetaOptimizer, phi: MetaParams, batch: Task) -> bool:
    """Whether one task's forward pass is so short that a loop over tasks would mostly call torch."""
    network = network_of(method.learner)
    if network is None or any(isinstance(m, _LARGE) for m in network.net.modules()):
        return False
    rows = trees.flatten(batch.support)[0].shape[1]
    return sum(x.numel() for x in phi.weights.values()) * rows <= SMALL


def one_step(method: MetaOptimizer, phi: MetaParams, batch: Task) -> int:
    """Bytes that autograd keeps of one inner step of one task, to be differentiated."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves: MetaParams = trees.map_tensors(lambda x: x.detach().requires_grad_(x.is_floating_point()), phi)
    learnt, fixed = method.split(leaves)
    with torch.random.fork_rng(devices=[]), autograd(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task: Any = trees.index(batch, 0)
        learner = Bound(method.learner, fixed, keys(1, phi.device)[0])
        try:
            for _ in inner_loop(learner, learnt, task.support, exact, steps=1):
                pass
        except (RuntimeError, ValueError, IndexError, TypeError):
            return 0  # what is wrong is said where it is run
    return sum(kept.values())
