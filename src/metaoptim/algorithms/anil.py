"""ANIL: almost no inner loop.

    h'_i = h − α ∇_h L_i(w, h; S_i)                   (K such steps) the head h adapts, the body w does not
    (w, h) ← (w, h) − β ∇_(w,h) mean_i L_i(w, h'_i; Q_i)

Paper: Raghu, Raghu, Bengio and Vinyals 2020, https://arxiv.org/abs/1909.09157, section 4.

Deviations: tasks are averaged, and losses are means (see `maml` for what that does to published step sizes).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.rules import SGD


def anil(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features on which a few steps of the head alone fit a task.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        head: the submodule that adapts; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts="head",
        learns="all",
        estimator=Unroll(),
        head=head,
        normalisation=normalisation,
        name="anil",
    )
