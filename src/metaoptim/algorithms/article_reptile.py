"""A widely read essay's Reptile, taken literally: for study, not for use.

    θ̄ = mean_i θ'_i,  θ'_i after K gradient steps on all of D_i
    θ ← θ + β (θ̄ − θ)                                 with constant β

Paper: none; compare Nichol, Achiam and Schulman 2018, https://arxiv.org/abs/1803.02999, which anneals β to 0 and takes
minibatch steps of Adam. With one inner step this is joint training, and says so.

Deviations: none from the formula as printed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import MetaOptimizer, Normalisation, Outer
from metaoptim.estimators import Displacement
from metaoptim.rules import SGD


def article_reptile(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 5,
    beta: float = 0.1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Moves the start towards the mean of the adapted weights, always by the same fraction.

    Args:
        lr: inner step size α on the mean loss, full-batch gradient descent.
        steps: inner steps K in training; 1 is joint training, which is warned about.
        beta: the fraction β of the way to the mean that each outer step goes.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_positive(beta=beta)
    if steps == 1:
        warn("with steps=1 this is joint training: θ̄ − θ = −α · the mean gradient. Use steps >= 2.")
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        estimator=Displacement(),
        normalisation=normalisation,
        outer=Outer("SGD", lr=beta),
        name="article_reptile",
    )
