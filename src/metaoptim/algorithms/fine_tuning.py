"""Training without tasks, and a head of its own for each new task: what several baselines have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose, generator
from metaoptim.core.checks import check_choice
from metaoptim.core.reductions import Reduce
from metaoptim.core.types import MetaOptimizer, MetaParams, Normalisation
from metaoptim.estimators import Joint
from metaoptim.learners import Network, head_start
from metaoptim.rules import SGD


def fine_tuned(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    pooled: Any,
    *,
    lr: float,
    steps: int,
    adapts: Literal["head", "all"],
    head: str | None,
    normalisation: Normalisation,
    name: str,
    reduction: Reduce = "mean",
) -> MetaOptimizer:
    """Training without tasks by the loss `pooled`, whose weights are ψ; a task fine-tunes a head of its own, from 0."""
    check_choice(("head", "all"), adapts=adapts)
    network = Network(net, loss, normalisation, head)
    method = compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts=adapts,
        learns="body",
        estimator=Joint(),
        head=head,
        start=head_start(network, "zero"),
        normalisation=normalisation,
        reduction=reduction,
        name=name,
    )
    learner: Any = method.learner
    phi = MetaParams(method.phi.weights, pooled.start(network, generator()))
    return replace(method, learner=replace(learner, pooled=pooled), phi=phi)
