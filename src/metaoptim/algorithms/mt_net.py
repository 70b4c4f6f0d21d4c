"""MT-Net: a T-Net in which every task moves a random subset of the units, whose probabilities are learnt.

    y = T (W x + b);   θ' = θ − α m ∘ ∇_θ L_i(θ, T; S_i)      (K such steps), m_u ∈ {0, 1} for each unit u of a layer
    m_u = [ζ_u + γ_u > 0],   γ_u = log u_1 − log (1 − u_1), one draw for each task;   ∂m_u := ∂ sigmoid(ζ_u + γ_u)
    (θ, T, ζ) ← (θ, T, ζ) − β ∇_(θ,T,ζ) mean_i L_i(θ'_i, T; Q_i)

Paper: Lee and Choi 2018, https://arxiv.org/abs/1801.05558, section 3.2 (a straight-through Gumbel-softmax, temperature 1).

Deviations: the two Gumbel draws of the published code are one of their difference, which is logistic. Scale and shift of batch
norms have units too. Training draws by each task's key; where there is none, torch's generator does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_positive
from metaoptim.core.gradients import hold
from metaoptim.core.types import MetaOptimizer, Normalisation, Params, State, Step
from metaoptim.learners import Network, named
from metaoptim.nn import Transform, uniform

ADVICE = "put mo.nn.Transform after its layers, or build it with transforms=True (mo.nn.mlp, mo.nn.conv4)"


def example_net(ways: int) -> nn.Module:
    """Of one wide layer, of which some units move in every task."""
    layers = OrderedDict(
        flatten=nn.Flatten(), hidden=nn.Linear(16, 12), mix=Transform(12), features=nn.Tanh(), head=nn.Linear(12, ways)
    )
    return nn.Sequential(layers)


@dataclass(frozen=True)
class Masked:
    """u = −lr · m ∘ g with ψ = {LAYER.logits_U: ζ (U)}, 0 at the start, for the U units of a layer: its weights' first axis."""

    lr: float
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {_units(n, w): w.new_zeros(w.shape[:1]) for n, w in weights.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {n: u.log() - (1 - u).log() for n, u in uniform(psi).items()}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        masks = {n: _straight_through(psi[n] + drawn) for n, drawn in state.items()}
        return {n: -self.lr * _rows(masks[_units(n, g)], g) * g for n, g in grads.items()}, state


def _units(name: str, w: Tensor) -> str:
    return f"{name.rpartition('.')[0]}.logits_{w.shape[:1].numel()}".lstrip(".")


def _rows(mask: Tensor, g: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (g.ndim - 1))


def _straight_through(x: Tensor) -> Tensor:
    soft = x.sigmoid()
    return soft + hold((x > 0).to(x.dtype) - soft)


def mt_net(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start, the metric of its gradients, and which units a task moves.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    transforms = named(Network(net, loss, normalisation), "transform", ADVICE)
    return compose(
        net, loss, rule=Masked(lr), steps=steps, adapts=transforms.others, normalisation=normalisation, name="mt_net"
    )
