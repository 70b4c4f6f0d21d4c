"""Proto-MAML: MAML whose head starts at the prototypes of the support set.

    c_n = mean of f_θ(x) over the support's examples x of class n
    W_0 = 2 c_n,  b_0 = −‖c_n‖²                       logits 2⟨c_n, z⟩ − ‖c_n‖²: prototypical networks, before any step
    (θ', W, b) ← (θ', W, b) − α ∇ L_i(θ', W, b; S_i)  (K such steps) all weights adapt
    θ ← θ − β ∇_θ mean_i L_i(θ', W, b; Q_i)           through the steps, and through W_0 and b_0

Paper: Triantafillou, Zhu, Dumoulin, Lamblin, Evci, Xu, Goroshin, Gelada, Swersky, Manzagol and Larochelle 2020,
https://arxiv.org/abs/1903.03096.

Deviations: second derivatives are kept unless `first_order`, as the paper's runs are (their gradient goes through the start of
the head too). Scales and shifts of batch norms adapt, as they don't in the published code, and the query set is normalised as
the policy says, which there is by the support's statistics. A class that the support lacks starts at W = 0, b = 0, where the
published code masks it. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_counts, check_flags
from metaoptim.core.types import Batch, MetaOptimizer, Normalisation, Params
from metaoptim.estimators import Unroll
from metaoptim.learners import Network, class_means, members
from metaoptim.rules import SGD


@dataclass(frozen=True)
class PrototypeHead:
    """A start that makes the head of class means: of those of its weights that are not frozen."""

    network: Network

    def __post_init__(self) -> None:
        layer = self.network.head_layer
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            fix = "build it with bias=True" if isinstance(layer, nn.Linear) else 'choose such a layer by head="NAME"'
            raise ValueError(
                f"{self.network.head_told} can't start at prototypes, which are the weights and the bias of one linear layer: "
                f"{fix}."
            )

    def __call__(self, weights: Params, support: Batch) -> Params:
        """{HEAD.weight: (N, D), HEAD.bias: (N)}."""
        network, name = self.network, self.network.head_name
        means = class_means(network.features(weights, support[0], None), members(support[1], network.outputs))
        head = {f"{name}.weight": 2 * means, f"{name}.bias": -means.square().sum(-1)}
        return {n: p for n, p in head.items() if network.trainable(n)}


def proto_maml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.01,
    steps: int = 5,
    first_order: bool = False,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features and a body from which K steps fit a task, with a head that its own class means start.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        first_order: drop second derivatives.
        head: the linear layer that starts at the prototypes; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(0, steps=steps)
    check_flags(first_order=first_order)
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        learns="body",
        estimator=Unroll(first_order),
        head=head,
        start=PrototypeHead(Network(net, loss, normalisation, head)),
        normalisation=normalisation,
        name="proto_maml",
    )
