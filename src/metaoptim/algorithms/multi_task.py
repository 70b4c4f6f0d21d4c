"""Multi-task learning: a body that all training tasks share, a head for each, and conflicts between tasks heeded or not.

    g_t = ∇_θ L_t(V_t f_θ(x) + c_t, y)                T training tasks, each by its own head
    θ ← θ − β Σ_t w_t(g_1 … g_T) g_t                  w_t = 1/T, or weights by UPGrad, PCGrad or MGDA
    V_t, c_t ← V_t, c_t − (β/T) ∇ L_t                 heads are no two tasks', and don't conflict
    W ← W − α ∇_W L_i(W f_θ(·) + b; S_i)              (K such steps) a new task's head, from 0

Paper: Caruana 1997, https://doi.org/10.1023/A:1007379606734; Sener and Koltun 2018 (MGDA), https://arxiv.org/abs/1810.04650; Yu
et al. 2020 (PCGrad), https://arxiv.org/abs/2001.06782; Quinton and Rey 2024 (UPGrad), https://arxiv.org/abs/2406.16232.

Deviations: all reductions are on the scale of the mean, where PCGrad is published as a sum; heads get 1/T of their gradient, as
in the mean of all losses. An outer step sees T of the training tasks, and as many examples of each as an episode has. Heads are
as wide as the largest task needs. New tasks, of which the papers have none, are fine-tuned as in `pretrain`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.fine_tuning import fine_tuned
from metaoptim.core.checks import check_counts
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.learners import Heads


def multi_task(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    heads: int = 1,
    outputs: int | None = None,
    reduction: Literal["mean", "upgrad", "pcgrad", "mgda"] = "mean",
    lr: float = 0.5,
    steps: int = 20,
    adapts: Literal["head", "all"] = "head",
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Trains one body with a head for each training task; a new task fine-tunes a head of its own on the features, or all.

    Args:
        heads: the number of training tasks M: the task family must have as many.
        outputs: outputs of each training head: the classes of the largest training task; none: as many as the network has.
        reduction: how the tasks' gradients in the body become one: "mean" (of the losses), "upgrad", "pcgrad" or "mgda".
        lr: step size α of fine-tuning, on the mean loss.
        steps: inner steps K in validation and at test; training takes none.
        adapts: what is fine-tuned: "head" or "all".
        head: the linear layer that a task replaces by its own; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(heads=heads, outputs=outputs)
    return fine_tuned(
        net, loss, Heads(heads, outputs), lr=lr, steps=steps, adapts=adapts, head=head, normalisation=normalisation,
        reduction=reduction, name="multi_task",
    )  # fmt: skip
