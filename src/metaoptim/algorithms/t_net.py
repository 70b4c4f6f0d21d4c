"""T-Net: a matrix after every layer, which shapes the gradients of the layers before it.

    y = T (W x + b);   θ' = θ − α ∇_θ L_i(θ, T; S_i)  (K such steps) θ = all (W, b) adapt, the matrices T do not
    (θ, T) ← (θ, T) − β ∇_(θ,T) mean_i L_i(θ'_i, T; Q_i)

Paper: Lee and Choi 2018, https://arxiv.org/abs/1801.05558, section 3.1; with masks on the gradients it is `mt_net`.

Deviations: T stands after a layer's bias, as in the published code, ahead of a batch norm. Weights called `transform` are T.
Tasks are averaged, and losses are means (see `maml` for what that does to published step sizes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.learners import Network, named
from metaoptim.nn import BatchNorm, Transform
from metaoptim.rules import SGD

ADVICE = "put mo.nn.Transform after its layers, or build it with transforms=True (mo.nn.mlp, mo.nn.conv4)"


def example_net(ways: int) -> nn.Module:
    """A transform after every layer, the last one included."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
            mix=Transform(3),
            norm=BatchNorm(3),
            tanh=nn.Tanh(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(12, 5),
            mix_hidden=Transform(5),
            features=nn.Tanh(),
            head=nn.Linear(5, ways),
            mix_head=Transform(ways),
        )
    )


def t_net(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start, and the metric in which its weights' gradients are taken.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    transforms = named(Network(net, loss, normalisation), "transform", ADVICE)
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts=transforms.others,
        normalisation=normalisation,
        name="t_net",
    )
