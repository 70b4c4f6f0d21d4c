"""LSLR: per-layer per-step learning rates.

    θ_(l,k+1) = θ_(l,k) − α_(l,k) ∇_(θ_l) L_i(θ_k; S_i)      for each layer l and step k = 0 … K−1
    (θ, α) ← (θ, α) − β ∇_(θ,α) mean_i L_i(θ_K; Q_i)

Paper: Antoniou, Edwards and Storkey 2019, https://arxiv.org/abs/1810.09502, section 4, "Learning Per-Layer Per-Step Learning
Rates and Gradient Directions"; the rest of that paper is `maml_plus_plus`.

Deviations: a layer is a module, as in the paper's text; its code has a step size for each weight tensor, and one more row than
steps, which nothing uses. Steps beyond K go on with the last step size. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_counts, check_flags
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import LayerStepSizes


def lslr(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 5,
    first_order: bool = False,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start, and a step size for every layer and inner step.

    Args:
        lr: every inner step size α at the start, on the mean loss.
        steps: inner steps K in training.
        first_order: drop second derivatives.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_flags(first_order=first_order)
    return compose(
        net,
        loss,
        rule=LayerStepSizes(lr, steps),
        steps=steps,
        estimator=Unroll(first_order=first_order),
        normalisation=normalisation,
        name="lslr",
    )
