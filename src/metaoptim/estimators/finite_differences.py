"""∇φ by central differences of whole inner runs, one learnt number after the other: no derivative of the run at all.

    ∂L/∂φ_i ≈ [L(φ + h e_i) − L(φ − h e_i)] / 2h

Two runs for each learnt number, in the memory of one: for a handful of hyper-parameters, and to hold other estimators to. It
differentiates what a run does, with what a rule holds constant for the others, such as Adam's denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_positive, check_time
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Carry, Claim, Clock, Estimate, Info, Learner, MetaParams, Task
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class FiniteDifferences(Plain):
    """step: h, times |φ_i| where that is above 1; by default the cube root of the float type's precision (5e-3 in float32)."""

    step: float | None = None
    claim: ClassVar[Claim] = "exact"
    holds: ClassVar[bool] = False  # what a rule holds is differentiated too
    divides: ClassVar[bool] = True  # by a small number, which amplifies rounding

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_positive(step=self.step)
        count = sum(x.numel() for x in trees.flatten(learnt))
        check_time(2 * count * learner.steps, f"FiniteDifferences, for {count:,} learnt numbers,")

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        leaves = trees.flatten(phi)

        def run(phi: MetaParams) -> tuple[Tensor, Info]:
            *_, (k, state) = inner_loop(learner, phi, task.support, held)
            return learner.loss(phi, state, task.support, task.query, k)

        def moved(i: int, j: int, h: float) -> tuple[Tensor, Tensor]:
            """The loss with the j-th number of the i-th tensor moved, and that number."""
            flat = leaves[i].reshape(-1)
            there = flat[j] + h * flat[j].abs().clamp(min=1.0)
            other = torch.where(torch.arange(len(flat), device=flat.device) == j, there, flat).view_as(leaves[i])
            return run(trees.unflatten([*leaves[:i], other, *leaves[i + 1 :]], phi))[0], there

        def slope(i: int, j: int) -> Tensor:
            h = self.step or torch.finfo(leaves[i].dtype).eps ** (1 / 3)
            (above, up), (below, down) = moved(i, j, h), moved(i, j, -h)
            return (above - below) / (up - down)

        with torch.no_grad():
            loss, info = run(phi)
            found = [torch.stack([slope(i, j) for j in range(x.numel())]).view_as(x) for i, x in enumerate(leaves)]
        gradient: MetaParams = trees.unflatten(found, phi)
        return Estimate(loss, gradient, carry, info)
