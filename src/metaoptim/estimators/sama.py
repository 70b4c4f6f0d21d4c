"""∇φ through the last inner step alone, with no second derivative: a cross derivative by one central difference.

With x the weights before the last step, g = ∇f(φ, x) its gradient, s_K = apply(φ, s_{K−1}, g), and L the outer loss,

    v = ∂L(φ, s_K) / ∂g                                           through the rule: for SGD, −α ∂L/∂x
    ∇φ L ≈ ∂L/∂φ + ‖v‖ [∂f(φ, x + r v/‖v‖)/∂φ − ∂f(φ, x − r v/‖v‖)/∂φ] / 2r

where ∂L/∂φ is what L and `apply` owe to φ themselves. It takes the Hessian of the implicit gradient for the identity, and
corrects for the optimizer by ∂u/∂g. Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing 2023,
https://arxiv.org/abs/2310.05674, section 3; with the rule SGD and K = 1 it is the second-order form of DARTS (Liu, Simonyan and
Yang 2019, https://arxiv.org/abs/1806.09055, eqs. 7 and 8).

Deviations: the difference is taken where the last step was taken, x_{K−1}, and v where it led: so the estimate is the exact
derivative of one step, up to O(r²), and at a minimum both places are one. The optimizer's correction is the rule's own
derivative, for any rule, with what a rule holds (Adam's denominator) held, and with the step size, which the published code
leaves out for SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_positive
from metaoptim.core.gradients import held, outermost, pullback
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Carry, Claim, Clock, Estimate, Estimator, Info, Learner, MetaParams, Params, Task
from metaoptim.estimators.last_steps import refuse_start
from metaoptim.estimators.plain import Plain
from metaoptim.estimators.unroll import Unroll

TINY = 1e-30  # keeps 0/0 at 0


@dataclass(frozen=True, repr=False)
class SAMA(Plain):
    """radius: r, how far the weights are moved either way; by default the cube root of the float type's precision (5e-3 in
    float32), where truncation and rounding are about as large."""

    radius: float | None = None
    claim: ClassVar[Claim] = "truncated"
    window: ClassVar[int] = 1
    divides: ClassVar[bool] = True  # by a small number, which amplifies rounding
    target: ClassVar[Estimator] = Unroll()

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_positive(radius=self.radius)
        if learner.steps < 1:
            raise ValueError("SAMA differentiates through the last inner step, and there is none; take steps >= 1.")
        refuse_start(learner, learnt, "SAMA")

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        *_, (k, before) = inner_loop(learner, phi, task.support, held, learner.steps - 1)
        grads, value = held(*learner.inner(phi, before, task.support, k))

        def judged(phi: MetaParams, grads: Params, value: Tensor) -> tuple[Tensor, Info]:
            state = learner.apply(phi, before, grads, value, k)
            return learner.loss(phi, state, task.support, task.query, k + 1)

        loss, pull, info = pullback(judged, phi, grads, value)
        direct, v, of_value = pull(torch.ones_like(loss))
        size = trees.norm(v)
        radius = self.radius or torch.finfo(size.dtype).eps ** (1 / 3)
        shift = {n: x * (radius / (size + TINY)) for n, x in v.items()}

        def slope(sign: float) -> MetaParams:
            def moved(phi: MetaParams) -> tuple[Tensor, Info]:
                f, x = learner.inner(phi, before, task.support, k)
                return f(trees.add(x, shift, sign))

            found: MetaParams = outermost(moved, phi)[0]
            return found

        ahead, behind = slope(1.0), slope(-1.0)
        cross = trees.zip_tensors(lambda a, b: (a - b) * (size / (2 * radius)), ahead, behind)
        there = trees.zip_tensors(lambda a, b: of_value * (a + b) / 2, ahead, behind)
        return Estimate(loss, trees.plus(direct, trees.plus(cross, there)), carry, info)
