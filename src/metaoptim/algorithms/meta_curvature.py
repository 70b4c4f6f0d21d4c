"""Meta-Curvature: the start, and a matrix for every mode of a weight tensor, by which its gradient is multiplied.

    θ' = θ − α MC(∇_θ L_i(θ; S_i)),   MC(G) = G ×₁ M_out ×₂ M_in ×₃ M_filter      (biases: element by element)
    (θ, M) ← (θ, M) − β ∇_(θ,M) mean_i L_i(θ'_i; Q_i)

Paper: Park and Oliva 2019, https://arxiv.org/abs/1902.03356, section 3 (MC2).

Deviations: none in the update; every M starts as the identity, so that training starts as MAML, and all inner steps share them.
The order of the three products makes no difference. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_flags, check_positive
from metaoptim.core.types import MetaOptimizer, Normalisation, Params, State, Step
from metaoptim.estimators import Unroll


@dataclass(frozen=True)
class Curvature:
    """u = −lr · MC(g) with ψ = {out.NAME: (O, O), in.NAME: (I, I), filter.NAME: (D, D)} for weights (O, I, …) of D positions,
    and {scale.NAME: …}, element by element, for those of one axis or none."""

    lr: float
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {key: p for n, w in weights.items() for key, p in _identities(n, w).items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return {n: -self.lr * _multiplied(psi, n, g) for n, g in grads.items()}, state


def _identities(name: str, w: Tensor) -> Params:
    if w.ndim < 2:
        return {f"scale.{name}": torch.ones_like(w)}
    sizes = {"out": w.shape[0], "in": w.shape[1]} | ({"filter": w[0, 0].numel()} if w.ndim > 2 else {})
    return {f"{mode}.{name}": torch.eye(size, dtype=w.dtype, device=w.device) for mode, size in sizes.items()}


def _multiplied(psi: Params, name: str, g: Tensor) -> Tensor:
    if g.ndim < 2:
        return psi[f"scale.{name}"] * g
    x = psi[f"in.{name}"] @ g.reshape(*g.shape[:2], -1)
    if g.ndim > 2:
        x = x @ psi[f"filter.{name}"].mT
    return (psi[f"out.{name}"] @ x.flatten(1)).reshape(g.shape)


def meta_curvature(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    first_order: bool = False,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start, and how the gradients of a layer's weights are mixed.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        first_order: drop second derivatives: still exact in M for one step, approximate in θ.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_flags(first_order=first_order)
    rule, estimator = Curvature(lr), Unroll(first_order)
    return compose(net, loss, rule=rule, steps=steps, estimator=estimator, normalisation=normalisation, name="meta_curvature")
