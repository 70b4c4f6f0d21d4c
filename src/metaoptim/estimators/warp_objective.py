"""∇φ of the loss one step ahead, at every point of the inner run, with the point held: nothing is passed through the run.

    ∇φ (1/K) Σ_{k<K} loss(φ, apply(φ, s_k, ∇ inner(φ, s_k, S, k), k), Q)

with s_k held constant for what doesn't adapt and for ψ, which see each step by itself, exactly; and first order in the start of
what adapts, which moves all s_k and no inner gradient. Flennerhag, Rusu, Pascanu, Visin, Yin and Hadsell 2020,
https://arxiv.org/abs/1909.00025, eq. 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_counts
from metaoptim.core.gradients import exact, outermost
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import Carry, Claim, Clock, Estimate, Estimator, Info, Learner, MetaParams, Task
from metaoptim.estimators.plain import Plain
from metaoptim.estimators.unroll import Unroll


@dataclass(frozen=True, repr=False)
class WarpObjective(Plain):
    """The mean over the run of the loss one step ahead: exact in what doesn't adapt, first order in the start."""

    claim: ClassVar[Claim] = "first_order"
    stepwise: ClassVar[bool] = True  # what doesn't adapt sees one step at a time
    target: ClassVar[Estimator] = Unroll(objective=trajectory_mean)

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_counts(steps=learner.steps)

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        def outer(phi: MetaParams) -> tuple[Tensor, Info]:
            start = {n: p if learner.adapts(n) else p.detach() for n, p in phi.weights.items()}
            still = MetaParams(start, {n: p.detach() for n, p in phi.rule.items()})
            state = learner.init(still, task.support)
            losses: list[Tensor] = []
            info: Info = {}
            for i in range(learner.steps):
                k = torch.tensor(i, device=clock.key.device)
                here = trees.map_tensors(Tensor.detach, state)
                grads, value = exact(*learner.inner(phi, here, task.support, k))
                ahead = learner.apply(phi, state, grads, value, k)
                loss, info = learner.loss(phi, ahead, task.support, task.query, k + 1)
                losses.append(loss)
                constant = {n: g.detach() for n, g in grads.items()}
                state = learner.apply(still, state, constant, value.detach(), k)
            return torch.stack(losses).mean(), info

        gradient, (loss, info) = outermost(outer, phi)
        return Estimate(loss, gradient, carry, info)
