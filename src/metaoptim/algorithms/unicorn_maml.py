"""UNICORN-MAML: MAML with one vector for the heads of all classes.

    h_n = v for every class n;  (w'_i, h'_i) = (w, h) − α ∇_(w,h) L_i(w, h; S_i)      (K such steps) each h_n for itself
    (w, v) ← (w, v) − β ∇_(w,v) mean_i L_i(w'_i, h'_i; Q_i)

Paper: Ye and Chao 2022, https://arxiv.org/abs/2106.16245, section 5.

Deviations: v is the mean of the rows of the module's own head, each of which gets 1/N of its gradient (Adam can't tell). The
head's bias starts every task at 0 and is not learnt: one that all classes share cancels in a softmax. The paper takes more
steps than the usual five. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.learners import Names, Network, head_start
from metaoptim.rules import SGD


def unicorn_maml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 5,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start at which no class is told from another, so that the order of the classes makes no difference.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        head: the submodule whose rows start alike; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    network = Network(net, loss, normalisation, head)
    start = head_start(network, "equal")
    biases = Names(tuple(n for n in start.names.names if network.weights()[n].ndim < 2))
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        learns=biases.others,
        estimator=Unroll(),
        head=head,
        start=start,
        normalisation=normalisation,
        name="unicorn_maml",
    )
