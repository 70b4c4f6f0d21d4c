"""The few tasks that a check runs on: the user's own, or random ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine import check_tasks
from metaoptim.engine.faults import explained
from metaoptim.gradcheck.differences import seeded
from metaoptim.gradcheck.parts import said
from metaoptim.learners import Heads, network_of
from metaoptim.nn import written_out
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.training_tasks import check_heads, numbered

TASKS = 3  # so that two at a time leave a rest
ROWS = 6  # of a random task
MANY_CLASSES = 100
IMAGE = (28, 28)


def sample(method: MetaOptimizer, tasks: Task | TaskFamily | None, shape: Sequence[int] | None) -> Task:
    """A batch of tasks: as it is, from a family, or random."""
    if isinstance(tasks, Task):
        check_tasks(tasks)
        return tasks
    if tasks is None:
        return random_tasks(method, shape)
    if isinstance(pooled := getattr(method.learner, "pooled", None), Heads):
        check_heads(tasks, pooled.heads, pooled.outputs)
        return numbered(tasks, pooled.heads, seed=0, step=0, count=TASKS)
    return tasks.sample("train" if "train" in tasks.splits else tasks.splits[0], seed=0, start=0, count=TASKS)


def random_tasks(method: MetaOptimizer, shape: Sequence[int] | None) -> Task:
    """Random inputs of a shape, with random targets of the kind that the loss takes: classes, or numbers."""
    network = network_of(method.learner)
    if network is None:
        raise ValueError("this learner's objective is no Network, so that random tasks can't be made for it; give tasks.")
    draw = torch.Generator().manual_seed(0)
    dtype, device = next(iter(method.phi.weights.values())).dtype, method.phi.device

    def inputs(rows: int) -> Tensor:
        return torch.randn(
            (2, TASKS, rows, *(shape or _readable(network.net))), generator=draw, dtype=dtype, device=draw.device
        ).to(device)

    x = inputs(ROWS)
    output = forward(method, x[0, 0])
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returned {type(output).__name__}; for random tasks it must return one tensor: give tasks.")
    if output.ndim == 2 and ROWS < output.shape[-1] <= MANY_CLASSES:  # so that a support set has all of them
        x = inputs(output.shape[-1])
        output = forward(method, x[0, 0])
    order = torch.rand((2, TASKS, *output.shape[:-1]), generator=draw, device=draw.device).argsort(2)
    classes = (order % output.shape[-1]).to(device)
    try:
        network.loss(output, classes[0, 0])
        y = classes
    except (IndexError, RuntimeError, TypeError, ValueError):
        y = torch.randn((2, TASKS, *output.shape), generator=draw, dtype=dtype, device=draw.device).to(device)
    return Task((x[0], y[0]), (x[1], y[1]))


def refuse_unreadable(method: MetaOptimizer, batch: Task) -> None:
    """Raises a ValueError for tasks that the model or the loss can't take."""
    network = network_of(method.learner)
    if network is None:
        return
    for part in trees.index(batch, 0):
        output = forward(method, part[0])
        with explained(batch, method), torch.no_grad(), seeded(trees.device(part)):
            if isinstance(pooled := getattr(method.learner, "pooled", None), Heads):
                pooled(network, method.phi, part)
            else:
                network.mean_loss(output, part[1])


def forward(method: MetaOptimizer, x: Any) -> Any:
    """What a copy of the model makes of one batch; a ValueError where it can't."""
    network = network_of(method.learner)
    net = copy.deepcopy(network.net) if network else nn.Identity()
    weights = network.initial(method.phi.weights) if network else method.phi.weights
    with explained(x, method), seeded(trees.device(x)), torch.no_grad(), written_out():
        try:
            return functional_call(net, trees.map_tensors(torch.clone, weights), (x,))
        except TypeError as error:
            raise ValueError(f"the model can't be called with one tensor ({said(error)}).") from error


def _readable(net: nn.Module) -> tuple[int, ...]:
    """The shape of one input, by the first layer."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            return (layer.in_features,)
        if isinstance(layer, nn.Conv2d):
            return (layer.in_channels, *IMAGE)
    raise ValueError("no layer tells the shape of an input; give tasks, or input=, such as input=(1, 28, 28).")
