"""Prototypical networks.

    c_n = mean of f_θ(x) over the support's examples x of class n
    p(y = n | x) = softmax_n(−‖f_θ(x) − c_n‖²)        summed over the features, not averaged
    θ ← θ − β ∇_θ mean_i L_i(−‖f_θ(·) − c‖²; Q_i)     no inner steps

Paper: Snell, Swersky and Zemel 2017, https://arxiv.org/abs/1703.05175, eqs. 1 and 2.

Deviations: support and query are normalised as the policy says, where the paper's code passes both through batch norm as one
batch in training and uses running statistics at test; tasks are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaoptim.core.checks import check_counts
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Normalisation, State
from metaoptim.estimators import Unroll
from metaoptim.learners import ClosedForm, Network, class_means, embedded, mask, members


@dataclass(frozen=True)
class Prototypes:
    """ways: the number of classes, where the network's output is the features; None: its head tells, and is left out."""

    ways: int | None = None

    def fit(self, network: Network, phi: MetaParams, support: Batch) -> State:
        """Class means (N, D) of features, and how many examples each is the mean of (N)."""
        member = members(support[1], self.ways or network.outputs)
        z = embedded(network, phi.weights, support[0], None, self.ways)
        return {"means": class_means(z, member), "count": member.sum(0)}

    def predict(self, network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        """Logits (B, N): minus the squared distance to each class mean; −∞ for classes that the support lacks."""
        z = embedded(network, phi.weights, x, support, self.ways)
        distance = (z[:, None] - state["means"][None]).square().sum(-1)
        return torch.where(state["count"] > 0, -distance, -math.inf)


def protonet(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    head: str | None = None,
    ways: int | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features in which a class is where the mean of its examples is.

    Args:
        head: the layer that is left out, whose inputs are the features and whose number of outputs is that of the classes;
            none: the one called `head`, else the last linear layer.
        ways: the number of classes, for a network whose output (B, D) is the features: nothing is left out then.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(ways=ways)
    network, prototypes = Network(net, loss, normalisation, head), Prototypes(ways)
    return MetaOptimizer(
        ClosedForm(network, prototypes.fit, prototypes.predict),
        Unroll(),
        MetaParams(network.weights(), {}),
        learns=mask(network, "all" if ways else "body"),
        name="protonet",
    )
