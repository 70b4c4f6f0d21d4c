"""MAML: model-agnostic meta-learning.

    θ'_i = θ − α ∇_θ L_i(θ; S_i)                      (K such steps)
    θ ← θ − β ∇_θ mean_i L_i(θ'_i; Q_i)               through the inner steps, second derivatives included

Paper: Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, eq. 1 and algorithm 2.

Deviations: tasks are averaged where algorithm 2 sums (Adam can't tell); losses are means over examples, where the
paper's code divides the summed cross-entropy by the shots alone: its inner step size α is α·N here (0.4 on 5-way Omniglot
is 2.0).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import SGD


def maml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start from which K steps of gradient descent fit a task.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    return compose(net, loss, rule=SGD(lr), steps=steps, estimator=Unroll(), normalisation=normalisation, name="maml")
