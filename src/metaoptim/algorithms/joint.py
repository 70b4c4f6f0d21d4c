"""Joint training: one model for all tasks, fine-tuned to each.

    θ ← θ − β ∇_θ mean_i L_i(θ; S_i ∪ Q_i)            all examples of all tasks, as if they were one task
    θ'_i = θ − α ∇_θ L_i(θ; S_i)                      (K such steps) at test

Paper: Caruana 1997, https://doi.org/10.1023/A:1007379606734; as a baseline: Finn, Abbeel and Levine 2017,
https://arxiv.org/abs/1703.03400, section 5.1.

Deviations: none of the losses is weighted. Where a task's labels are numbers that mean another class in every task, nothing can
be learnt from all tasks together: `pretrain` trains on the classes themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Joint
from metaoptim.rules import SGD


def joint(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 10,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Trains one model on the examples of all tasks, which each task then fine-tunes.

    Args:
        lr: step size α of fine-tuning, on the mean loss.
        steps: inner steps K in validation and at test; training takes none.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    return compose(net, loss, rule=SGD(lr), steps=steps, estimator=Joint(), normalisation=normalisation, name="joint")
