"""Pretraining and fine-tuning: the baseline that a meta-learner must beat.

    θ, V, c ← arg min E L(V f_θ(x) + c, y)            one classifier of all training classes, on pooled examples
    W ← W − α ∇_W L_i(W f_θ(·) + b; S_i)              (K such steps) a task's own head, from 0

Paper: Chen, Liu, Kira, Wang and Huang 2019, https://arxiv.org/abs/1904.04232, section 3.2 (Baseline).

Deviations: the head is fine-tuned by K steps of gradient descent on the whole support set from a head of 0, where the published
code takes 100 epochs of minibatches of 4 by SGD with momentum 0.9, dampening 0.9 and weight decay 1e-3 from a random one. An
outer step sees as many examples as one of a method that trains on episodes, normalised in groups of one episode's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.fine_tuning import fine_tuned
from metaoptim.core.checks import check_counts
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.learners import Classifier


def pretrain(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    classes: int = 64,
    lr: float = 0.5,
    steps: int = 20,
    adapts: Literal["head", "all"] = "head",
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Trains an ordinary classifier; a task fine-tunes a head of its own on the features, or all of it.

    Args:
        classes: the number of training classes: the tasks must have as many.
        lr: step size α of fine-tuning, on the mean loss.
        steps: inner steps K in validation and at test; training takes none.
        adapts: what is fine-tuned: "head" or "all".
        head: the linear layer that a task replaces by its own; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(2, classes=classes)
    return fine_tuned(
        net, loss, Classifier(classes), lr=lr, steps=steps, adapts=adapts, head=head, normalisation=normalisation,
        name="pretrain",
    )  # fmt: skip
