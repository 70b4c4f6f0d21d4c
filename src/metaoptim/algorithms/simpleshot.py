"""SimpleShot: nearest centroids of an ordinary classifier's features, centred and of length 1.

    θ, W, b ← arg min E L(W f_θ(x) + b, y)            a classifier of all training classes; m: the mean of its features
    z(x) = (f_θ(x) − m) / ‖f_θ(x) − m‖                (CL2N)
    p(y = n | x) = softmax_n(−‖z(x) − c_n‖²)          c_n: the mean of z(x) over the support's examples x of class n

Paper: Wang, Chao, Weinberger and van der Maaten 2019, https://arxiv.org/abs/1911.04623, section 3.

Deviations: m, which the paper takes over the training set once the classifier is trained, is a parameter beside it: the loss
has a term γ/2 ‖m − mean f_θ(x)‖² with a small γ (0.001), which moves m by an optimizer that divides by the size of gradients,
as Adam does, and hardly θ. The paper's classifiers are trained for many epochs on augmented images. The paper names the nearest
centroid alone: the softmax, and so the loss of a task, is an addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaoptim.algorithms.compose import generator
from metaoptim.core.checks import check_counts
from metaoptim.core.types import Batch, Info, MetaOptimizer, MetaParams, Normalisation, State
from metaoptim.estimators import Joint
from metaoptim.learners import Classifier, ClosedForm, Network, class_means, mask, members
from metaoptim.nn import directions

SMALL = 1e-3  # γ


@dataclass(frozen=True)
class Centroids:
    """A classifier of all training classes, which keeps the mean m of its features, and nearest centroids of a task's own."""

    classifier: Classifier

    @property
    def classes(self) -> int:
        """The number of training classes."""
        return self.classifier.classes

    def __call__(self, network: Network, phi: MetaParams, batch: Batch) -> tuple[Tensor, Info]:
        """The classifier's loss, and what moves m."""
        z = network.features(phi.weights, batch[0], None)
        loss, info = network.judge(self.classifier.logits(phi.rule, z), batch[1])
        return loss + SMALL / 2 * (phi.rule["mean"] - z.mean(0)).square().sum(), info

    def fit(self, network: Network, phi: MetaParams, support: Batch) -> State:
        """Centroids (N, D)."""
        return class_means(self.centred(network, phi, support[0], None), members(support[1], network.outputs))

    def predict(self, network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        """Logits (B, N): minus the squared distance to each centroid; −∞ for classes that the support lacks."""
        distance = (self.centred(network, phi, x, support)[:, None] - state[None]).square().sum(-1)
        return torch.where(members(support[1], network.outputs).any(0), -distance, -math.inf)

    def centred(self, network: Network, phi: MetaParams, x: Tensor, support: Batch | None) -> Tensor:
        """z (B, D)."""
        return directions(network.features(phi.weights, x, support) - phi.rule["mean"])


def simpleshot(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    classes: int = 64,
    head: str | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Trains an ordinary classifier, whose features, centred and of length 1, are told apart by the nearest class mean.

    Args:
        classes: the number of training classes: the tasks must have as many.
        head: the layer that is left out, whose inputs are the features and whose number of outputs is that of a task's classes;
            none: the one called `head`, else the last linear layer.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(2, classes=classes)
    network, own = Network(net, loss, normalisation, head), Centroids(Classifier(classes))
    rule = own.classifier.start(network, generator())
    phi = MetaParams(network.weights(), rule | {"mean": torch.zeros_like(rule["classifier.weight"][0])})
    learner = ClosedForm(network, own.fit, own.predict, pooled=own)
    return MetaOptimizer(learner, Joint(), phi, mask(network, "body"), name="simpleshot")
