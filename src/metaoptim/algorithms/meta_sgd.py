"""Meta-SGD: the start, and a step size for every weight.

    θ' = θ − α ∘ ∇_θ L_i(θ; S_i)
    (θ, α) ← (θ, α) − β ∇_(θ,α) mean_i L_i(θ'_i; Q_i)

Paper: Li, Zhou, Chen and Li 2017, https://arxiv.org/abs/1707.09835, eq. 2 and algorithm 1.

Deviations: with more than one inner step all of them share α; tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaoptim.core.trees import select
from metaoptim.core.types import Meta, MetaOptimizer, Normalisation, Params, Rule, State
from metaoptim.estimators import Unroll
from metaoptim.learners import GradientLearner, Network


def step_sizes(low: float, high: float) -> Rule:
    """u = −α ∘ g with ψ = {lr.NAME: α}, one per weight, unconstrained; drawn from U[low, high]."""

    def meta(weights: Params) -> Params:
        return {f"lr.{n}": torch.empty_like(w).uniform_(low, high) for n, w in weights.items()}

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        return {n: -psi[f"lr.{n}"] * g for n, g in grads.items()}, state

    return Rule(meta, lambda psi, weights: {}, update)


def meta_sgd(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    low: float = 0.005,
    high: float = 0.1,
    steps: int = 1,
    first_order: bool = False,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start and the size and sign of each weight's step.

    Args:
        low: smallest step size α at the start, on the mean loss.
        high: largest step size α at the start; equal to `low` for a constant.
        steps: inner steps K in training, all with the same α.
        first_order: drop second derivatives: still exact in α for one step, approximate in θ.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    network = Network(net, loss, normalisation)
    rule, weights = step_sizes(low, high), network.weights()
    return MetaOptimizer(
        GradientLearner(network, rule, steps, network.trainable),
        Unroll(first_order=first_order),
        Meta(weights, rule.meta(select(weights, network.trainable))),
        network.trainable,
        name="meta_sgd",
    )
