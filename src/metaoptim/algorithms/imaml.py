"""iMAML: MAML with implicit gradients.

    θ'_i ≈ argmin_x L_i(x; S_i) + (λ/2) ‖x − θ‖²      by K steps of gradient descent from θ
    θ ← θ − β mean_i (I + ∇²L_i(θ'_i; S_i) / λ)⁻¹ ∇L_i(θ'_i; Q_i)

Paper: Rajeswaran, Finn, Kakade and Levine 2019, https://arxiv.org/abs/1909.04630, eqs. 3 and 6.

Deviations: the inner steps descend the regularised loss, as the paper's text has it, where its code takes plain steps and then
one on the proximal term. Its solver has two dampings, with λ + 10 in place of λ; here there is one, added to the Hessian of the
regularised loss: damping = 10 gives that direction, λ / (λ + 10) times as long. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_counts, check_numbers, check_positive
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Implicit
from metaoptim.rules import SGD


def example_net(ways: int) -> nn.Module:
    """Without batch norm, which over few examples curves the loss so much that plain steps find no minimum."""
    layers = OrderedDict(flatten=nn.Flatten(), hidden=nn.Linear(16, 5), features=nn.Tanh(), head=nn.Linear(5, ways))
    return nn.Sequential(layers)


def imaml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 16,
    prox: float = 1.0,
    solver: Literal["cg", "neumann"] = "cg",
    iterations: int = 5,
    damping: float = 0.0,
    scale: float = 0.1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start near which the regularised solution of a task lies: memory and compute don't grow with how it is found.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training: enough to come near the minimum.
        prox: λ, the strength of the pull towards the start.
        solver: of the linear system: "cg" (conjugate gradients) or "neumann" (a series).
        iterations: of the solver.
        damping: added to the diagonal of the Hessian.
        scale: of the Neumann series, below 2 / (the largest curvature + λ + damping).
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_counts(0, iterations=iterations)
    check_numbers(0, prox=prox, damping=damping)
    check_positive(scale=scale)
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        prox=prox,
        estimator=Implicit(solver, iterations, damping, scale),
        normalisation=normalisation,
        name="imaml",
    )
