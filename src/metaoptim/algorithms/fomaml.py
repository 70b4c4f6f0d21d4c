"""FOMAML: first-order MAML.

    θ'_i = θ − α ∇_θ L_i(θ; S_i)                      (K such steps)
    θ ← θ − β mean_i ∇_θ' L_i(θ'_i; Q_i)              the Jacobian dθ'/dθ taken for the identity

Paper: Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, section 5.2.

Deviations: tasks are averaged, and losses are means (see `maml` for what that does to published step sizes).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import SGD


def fomaml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start as MAML does, without second derivatives.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    estimator = Unroll(first_order=True)
    return compose(net, loss, rule=SGD(lr), steps=steps, estimator=estimator, normalisation=normalisation, name="fomaml")
