"""WarpGrad: warp layers, learnt to bend the gradients of the layers that adapt (online form).

    θ_{k+1} = θ_k − α ∇_θ L_i(θ_k, ω; S_i)            k = 0 … K−1: the warp layers ω stay as they are
    ω ← ω − β ∇_ω mean_{i,k} L_i(θ_k − α ∇_θ L_i(θ_k, ω; S_i), ω; Q_i)          with θ_k held constant

Paper: Flennerhag, Rusu, Pascanu, Visin, Yin and Hadsell 2020, https://arxiv.org/abs/1909.00025, eq. 8 and algorithm 1.

Deviations: the start θ_0 is learnt by the first-order gradient of the same mean, where the paper takes Leap, or left as it is
(learns = "warp"); warp layers of `conv4(warp=True)` start as the identity; inner steps are plain gradient descent, and the
published code learns step sizes and momenta too; tasks and points of a run are averaged, and losses are means.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_choice, check_counts
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import WarpObjective
from metaoptim.learners import Network
from metaoptim.rules import SGD


def example_net(ways: int) -> nn.Module:
    """A hidden layer with a warp layer after it."""
    below = OrderedDict(flatten=nn.Flatten(), hidden=nn.Linear(16, 5), tanh=nn.Tanh())
    return nn.Sequential(OrderedDict(below, warp=nn.Linear(5, 5), features=nn.Tanh(), head=nn.Linear(5, ways)))


def warpgrad(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 5,
    warp: str = "warp",
    learns: Literal["all", "warp"] = "all",
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns layers that precondition the gradients of the others, at any point of a run, and a start for those.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        warp: what the names of warp layers begin with, at any depth, as in `block0.warp`; all other layers adapt.
        learns: what the outer loop learns: warp layers and the start of the others ("all"), or warp layers alone ("warp"), and
            the others start as the network has them.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_choice(("all", "warp"), learns=learns)

    def warps(name: str) -> bool:
        return any(part.startswith(warp) for part in name.split(".")[:-1])

    if not any(map(warps, Network(net, loss, normalisation).learnt)):
        raise ValueError(f"no layer's name begins with warp={warp!r}: name those that warp so, as conv4(warp=True) does.")
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts=lambda name: not warps(name),
        learns="all" if learns == "all" else warps,
        estimator=WarpObjective(),
        normalisation=normalisation,
        name="warpgrad",
    )
