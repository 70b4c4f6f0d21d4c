"""Matching networks: the labels of a support set, weighted by attention.

    a(x, x_i) = softmax_i(s · cos(f_θ(x), f_θ(x_i)))      over the support's examples x_i
    p(y = n | x) = Σ_i a(x, x_i) [y_i = n]
    θ ← θ − β ∇_θ mean_i L_i(log p; Q_i)                  no inner steps

Paper: Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra 2016, https://arxiv.org/abs/1606.04080, eq. 1.

Deviations: f embeds the support's examples too (the paper's g = f), each by itself: there are no full-context embeddings, by
which an LSTM reads the whole support set. Cosines are multiplied by a scale s, which is 1 in the paper, where the softmax is so
flat that training hardly starts; a much used reimplementation takes 100 · max(cos, 0), and adds 1e-6 to the mixture before its
logarithm, which is exact here. Tasks are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Normalisation, State
from metaoptim.estimators import Unroll
from metaoptim.learners import ClosedForm, Network, embedded, mask, members
from metaoptim.nn import directions


@dataclass(frozen=True)
class Attention:
    """scale: s; ways: the number of classes, where the network's output is the features; None: its head tells."""

    scale: float
    ways: int | None = None

    def fit(self, network: Network, phi: MetaParams, support: Batch) -> State:
        """Directions (M, D) of the support's features."""
        return directions(embedded(network, phi.weights, support[0], None, self.ways))

    def predict(self, network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        """Log-probabilities (B, N), not the logarithm of a softmax of them; −∞ for classes that the support lacks."""
        score = self.scale * directions(embedded(network, phi.weights, x, support, self.ways)) @ state.mT
        member = members(support[1], self.ways or network.outputs)
        present = member.any(0)
        # Of a class without examples all scores are summed, and not used: the logarithm of 0 has no gradient.
        of_class = torch.where(member | ~present, score[:, :, None], -math.inf).logsumexp(1)
        return torch.where(present, of_class - score.logsumexp(-1, keepdim=True), -math.inf)


def matching_net(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float = 10.0,
    head: str | None = None,
    ways: int | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features by which the support's nearest examples, by angle, give a query its label.

    Args:
        scale: s, what cosines are multiplied by ahead of the softmax.
        head: the layer that is left out, whose inputs are the features and whose number of outputs is that of the classes;
            none: the one called `head`, else the last linear layer.
        ways: the number of classes, for a network whose output (B, D) is the features: nothing is left out then.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_positive(scale=scale)
    check_counts(ways=ways)
    network, attention = Network(net, loss, normalisation, head), Attention(scale, ways)
    return MetaOptimizer(
        ClosedForm(network, attention.fit, attention.predict),
        Unroll(),
        MetaParams(network.weights(), {}),
        learns=mask(network, "all" if ways else "body"),
        name="matching_net",
    )
