"""BOIL: body only update in the inner loop.

    w'_i = w − α ∇_w L_i(w, h; S_i)                   (K such steps) the body w adapts, the head h does not
    (w, h) ← (w, h) − β ∇_(w,h) mean_i L_i(w'_i, h; Q_i)

Paper: Oh, Yoo, Kim and Yun 2021, https://arxiv.org/abs/2008.08882, section 3.

Deviations: tasks are averaged. The published code takes one step of 0.5 on the mean loss, the default here, and lets the scale
and shift of batch norms adapt, as here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import SGD


def boil(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.5,
    steps: int = 1,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a body whose features change to suit a head that stays as it is.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        head: the submodule that does not adapt; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts="body",
        learns="all",
        estimator=Unroll(),
        head=head,
        normalisation=normalisation,
        name="boil",
    )
