"""∇φ by backpropagation through the inner run: exact, or first order.

With s_{k+1} = step(φ, s_k, S, k) and weights v_k of the objective,

    exact:        ∇φ Σ_k v_k loss(φ, s_k(φ), Q)
    first order:  the same with every inner gradient taken as a constant, ∂g_k/∂φ := 0

Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400 (section 5.2 for the first-order form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad

from metaoptim.core import gradients
from metaoptim.core.objectives import Objective, last
from metaoptim.core.types import Batch, Carry, Estimate, Info, Learner, Memory, Meta, Run, State, Task, directly
from metaoptim.estimators.checkpointed import Backward


@dataclass(frozen=True)
class Unroll:
    """objective: which states of the run are judged; judged_on: the set that the outer loss is taken on.

    memory: what is kept of the run until it is differentiated: its "graph"; its states and a graph of one step at a time
    ("steps"); or states and inner gradients, with forward-over-reverse second derivatives ("mixed"). All the same numbers.
    run: how the parts of a run are computed, where its graph is not kept.
    """

    first_order: bool = False
    objective: Objective = last
    judged_on: Literal["query", "support"] = "query"
    memory: Memory = "graph"
    run: Run = directly
    memories: ClassVar[tuple[Memory, ...]] = ("graph", "steps", "mixed")

    def keeping(self, memory: Memory, run: Run = directly) -> Unroll:
        return replace(self, memory=memory, run=run)

    def check(self, learner: Learner, learnt: Meta) -> None:
        self.objective(learner.steps)

    def init(self, learner: Learner, meta: Meta) -> Carry:
        return ()

    def start(self, learner: Learner, meta: Meta, support: Batch, carry: Carry) -> State:
        return learner.init(meta, support)

    def __call__(self, learner: Learner, meta: Meta, task: Task, carry: Carry) -> Estimate:
        weights = self.objective(learner.steps)
        batch = task.query if self.judged_on == "query" else task.support
        grad_op = gradients.constant if self.first_order else grad

        def outer(meta: Meta) -> tuple[Tensor, Info]:
            state = learner.init(meta, task.support)
            losses: list[Tensor] = []
            info: Info = {}
            for k, weight in enumerate(weights):
                if k:
                    state = learner.step(meta, state, task.support, k - 1, grad_op)
                if weight:
                    loss, info = learner.loss(meta, state, batch, k)
                    losses.append(weight * loss)
            return torch.stack(losses).sum(), info

        if self.memory == "graph":
            gradient, (loss, info) = gradients.outermost_and_value(outer)(meta)
        else:
            back = Backward(learner, task, batch, weights, self.memory == "mixed", self.first_order, self.run)
            gradient, (loss, info) = back(meta)
        return Estimate(loss, gradient, carry, info)
