"""Reptile.

    θ̃_i = U^K(θ; S_i)                                 K steps of an optimizer on minibatches of the support
    θ ← θ + ε mean_i (θ̃_i − θ)                        ε annealed linearly to 0

Paper: Nichol, Achiam and Schulman 2018, https://arxiv.org/abs/1803.02999, section 2 and algorithm 2.

Deviations: tasks of a batch run side by side, so carried Adam moments go on within a task slot where the published code
hands them from task to task; minibatches cycle through the support in one random order per task, drawn by the task family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_choice, check_counts
from metaoptim.core.types import MetaOptimizer, Normalisation, Outer
from metaoptim.estimators import Displacement
from metaoptim.rules import SGD, Adam


def reptile(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 1e-3,
    steps: int = 5,
    batch_size: int | None = 10,
    inner: Literal["adam", "sgd"] = "adam",
    moments: Literal["carried", "reset"] = "carried",
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start that is close to where tasks end up: no second derivatives, no query set.

    Args:
        lr: step size of the inner optimizer on the mean loss.
        steps: inner steps K in training; 1 is joint training, which is warned about.
        batch_size: support examples per inner step; none: all of them.
        inner: "adam" (β1 = 0, as published) or "sgd".
        moments: Adam's second moments go on from task to task ("carried", as published) or start anew ("reset").
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_choice(("adam", "sgd"), inner=inner)
    check_choice(("carried", "reset"), moments=moments)
    if steps == 1:
        warn(
            "Reptile with steps=1 is joint training: the expected outer step is the plain gradient step on all tasks' "
            "pooled loss. Use steps >= 2 to learn how to adapt."
        )
    return compose(
        net,
        loss,
        rule=Adam(lr, b1=0.0) if inner == "adam" else SGD(lr),
        steps=steps,
        batch_size=batch_size,
        estimator=Displacement(moments=inner == "adam" and moments == "carried"),
        normalisation=normalisation,
        outer=Outer("SGD", lr=1.0, schedule="linear"),
        name="reptile",
    )
