"""Meta-SGD: the start, and a step size for every weight.

    θ' = θ − α ∘ ∇_θ L_i(θ; S_i)
    (θ, α) ← (θ, α) − β ∇_(θ,α) mean_i L_i(θ'_i; Q_i)

Paper: Li, Zhou, Chen and Li 2017, https://arxiv.org/abs/1707.09835, eq. 2 and algorithm 1.

Deviations: with more than one inner step all of them share α; long runs can be differentiated window by window (truncated
backpropagation), which the paper doesn't have; tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_flags, check_numbers
from metaoptim.core.types import MetaOptimizer, Normalisation, Params, State, Step
from metaoptim.estimators import Truncated, Unroll


@dataclass(frozen=True)
class StepSizes:
    """u = −α ∘ g with ψ = {lr.NAME: α}, one per weight, unconstrained; drawn from U[low, high]."""

    low: float
    high: float
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_numbers(low=self.low, high=self.high)
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: step sizes are drawn from low to high; swap them.")

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        def draw(w: Tensor) -> Tensor:  # where the generator is, so that every device starts from the same numbers
            u = torch.rand(w.shape, dtype=w.dtype, generator=generator, device=generator.device)
            return (self.low + (self.high - self.low) * u).to(w.device)

        return {f"lr.{n}": draw(w) for n, w in weights.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return {n: -psi[f"lr.{n}"] * g for n, g in grads.items()}, state


def meta_sgd(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    low: float = 0.005,
    high: float = 0.1,
    steps: int = 1,
    first_order: bool = False,
    window: int | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start and the size and sign of each weight's step.

    Args:
        low: smallest step size α at the start, on the mean loss.
        high: largest step size α at the start; equal to `low` for a constant.
        steps: inner steps K in training, all with the same α.
        first_order: drop second derivatives: still exact in α for one step, approximate in θ.
        window: steps that one outer step takes and differentiates through, of a run that the next one goes on with, judged
            after each step; it divides `steps`. None: the whole run, judged after its last step.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_flags(first_order=first_order)
    if first_order and window is not None:
        raise ValueError(
            f"first_order=True goes with the whole run alone, and window={window} was given; leave out one of them."
        )
    return compose(
        net,
        loss,
        rule=StepSizes(low, high),
        steps=steps,
        estimator=Unroll(first_order=first_order) if window is None else Truncated(window),
        normalisation=normalisation,
        name="meta_sgd",
    )
