"""A widely read essay's MAML, taken literally: for study, not for use.

    θ'_i = θ − α ∇_θ L(θ; D_i)
    θ ← θ − β Σ_i ∇_θ' L(θ'_i; D_i)                   at θ', on the SAME data

Paper: none; compare Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, which differentiates through θ' and
judges it on fresh data. To first order in α this is ∇(L − (α/2)‖∇L‖²): an extragradient step on the training loss.

Deviations: none from the formula as printed; `judged_on`, `first_order` and `reduction` undo its choices one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_flags
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import SGD


def article_maml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    judged_on: Literal["support", "query"] = "support",
    first_order: bool = True,
    reduction: Literal["sum", "mean"] = "sum",
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Fits each task's own data one look ahead; "query", second order and "mean" make it MAML.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        judged_on: the set whose loss is differentiated at θ': the one adapted on ("support", as printed) or "query".
        first_order: the gradient at θ' in place of the one through it, as printed.
        reduction: how the tasks of a batch are put together: "sum", as printed, or "mean".
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_flags(first_order=first_order)
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        estimator=Unroll(first_order=first_order, judged_on=judged_on),
        normalisation=normalisation,
        reduction=reduction,
        name="article_maml",
    )
