"""∇φ by backpropagation through the inner run: exact, or first order.

With s_{k+1} = apply(φ, s_k, g_k, k), g_k = ∇ inner(φ, s_k, S, k), and weights v_k of the objective,

    exact:        ∇φ Σ_k v_k loss(φ, s_k(φ), Q)
    first order:  the same with every inner gradient taken as a constant, ∂g_k/∂φ := 0
    annealed:     the same with a share c of its derivatives left out, ∂g_k/∂φ := (1 − c) ∂g_k/∂φ, as the outer step says

Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400 (section 5.2 for the first-order form); annealed: Antoniou,
Edwards and Storkey 2019, https://arxiv.org/abs/1810.09502, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metaoptim.core.gradients import outermost, taken
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.objectives import Objective, counts, last, scaled, weights_of
from metaoptim.core.types import (
    Call,
    Carry,
    Claim,
    Clock,
    Estimate,
    Estimator,
    Info,
    Learner,
    Memory,
    MetaParams,
    Order,
    Task,
    directly,
)
from metaoptim.estimators.checkpointed import Checkpointed
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class Unroll(Plain):
    """first_order: whether inner gradients are constants, or a function of the number of outer steps done: what share of their
    derivatives is left out. objective: which states of the run are judged; judged_on: the set that the outer loss is taken on.

    With such a function it claims to be first order, as it must be at outer step 0, where gradients are checked. Its memory
    modes "steps" and "mixed" are `Checkpointed`, with the same numbers.
    """

    first_order: Order = False
    objective: Objective = last
    judged_on: Literal["query", "support"] = "query"
    memories: ClassVar[tuple[Memory, ...]] = ("graph", "steps", "mixed")

    @property
    def claim(self) -> Claim:
        return "first_order" if self.first_order else "exact"

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        if memory == "graph":
            return self
        return Checkpointed(self.first_order, self.objective, self.judged_on, memory == "mixed", call)

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        if self.judged_on not in ("query", "support"):
            raise ValueError(f"judged_on {self.judged_on!r} is unknown: choose query or support.")
        weights_of(self.objective, learner.steps, torch.tensor(0))

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        weights = weights_of(self.objective, learner.steps, clock.outer_step)
        batch = task.query if self.judged_on == "query" else task.support
        gradient = taken(self.first_order, clock.outer_step)

        def outer(phi: MetaParams) -> tuple[Tensor, Info]:
            losses: list[Tensor] = []
            info: Info = {}
            for weight, (k, state) in zip(weights, inner_loop(learner, phi, task.support, gradient), strict=True):
                if counts(weight):
                    loss, info = learner.loss(phi, state, task.support, batch, k)
                    losses.append(scaled(weight, loss))
            return torch.stack(losses).sum(), info

        gradient_of_phi, (loss, info) = outermost(outer, phi)
        return Estimate(loss, gradient_of_phi, carry, info)
