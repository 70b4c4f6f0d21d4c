"""Baseline++: a classifier of cosines, pretrained and fine-tuned.

    θ, V ← arg min E L(t · cos(V_c, f_θ(x)), y)       one classifier of all training classes, on pooled examples
    W ← W − α ∇_W L_i(s · cos(W_n, f_θ(·)); S_i)      (K such steps) a task's own head, from a random one

Paper: Chen, Liu, Kira, Wang and Huang 2019, https://arxiv.org/abs/1904.04232, section 3.2 (Baseline++).

Deviations: the head is fine-tuned by K steps of gradient descent on the whole support set, where the published code takes 100
epochs of minibatches of 4 by SGD with momentum 0.9, dampening 0.9 and weight decay 1e-3. It starts at the network's own head,
the same for every task, of which a bias stays and is added to the cosines. The scales t and s are the published code's, 2 for
up to 200 outputs and 10 beyond. An outer step sees as many examples as one of a method that trains on episodes, normalised in
groups of one episode's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose, generator
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import MetaOptimizer, MetaParams, Normalisation
from metaoptim.estimators import Joint
from metaoptim.learners import Classifier, Network
from metaoptim.nn import with_cosines
from metaoptim.rules import SGD


def baseline_pp(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    classes: int = 64,
    lr: float = 1.0,
    steps: int = 20,
    scale: float | None = None,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Trains an ordinary classifier of cosines; a task fine-tunes a head of its own, of cosines too.

    Args:
        classes: the number of training classes: the tasks must have as many.
        lr: step size α of fine-tuning, on the mean loss.
        steps: inner steps K in validation and at test; training takes none.
        scale: what cosines are multiplied by; none: 2 for up to 200 classes, else 10, in training and in a task by itself.
        head: the layer that a task replaces by its own; none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(2, classes=classes)
    check_positive(scale=scale)
    cosines = with_cosines(net, Network(net, loss, normalisation, head).head_name, scale)
    network, classifier = Network(cosines, loss, normalisation, head), Classifier(classes, cosine=True, scale=scale)
    method = compose(
        cosines,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts="head",
        learns="body",
        estimator=Joint(),
        head=head,
        normalisation=normalisation,
        name="baseline_pp",
    )
    learner: Any = method.learner
    phi = MetaParams(method.phi.weights, classifier.start(network, generator()))
    return replace(method, learner=replace(learner, pooled=classifier), phi=phi)
