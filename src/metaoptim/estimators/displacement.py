"""The way that the weights went in the inner run, taken for a gradient: θ − θ_K.

A step of size ε along it is θ ← θ + ε (θ_K − θ). Nichol, Achiam and Schulman 2018, https://arxiv.org/abs/1803.02999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import (
    Carry,
    Claim,
    Clock,
    Estimate,
    Learner,
    MetaParams,
    State,
    Task,
)
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class Displacement(Plain):
    """moments: whether the rule's state goes on from one outer step to the next, or starts anew with every task.

    Carried state belongs to a task slot: slot i of a batch goes on from slot i of the batch before it.
    """

    moments: bool = False
    claim: ClassVar[Claim] = "displacement"

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        if learnt.rule:
            raise ValueError(
                f"the displacement of the weights says nothing about the rule's own parameters ({min(learnt.rule)}, …); "
                "use Unroll, or a rule without any, such as SGD."
            )
        shared = [n for n in learnt.weights if not learner.adapts(n)]
        if shared:
            raise ValueError(
                f"the displacement is zero for weights that do not adapt, such as {shared[0]}; let every learnt weight "
                "adapt, or use Unroll."
            )

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Carry:
        return learner.heritage(learner.init(phi, task.support)) if self.moments else ()

    def inherit(self, carry: Carry) -> State:
        return carry

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        with torch.no_grad():
            state = learner.init(phi, task.support)
            first = torch.zeros_like(clock.outer_step)
            start = (first, learner.inherit(state, carry) if self.moments else state)
            *_, (k, state) = inner_loop(learner, phi, task.support, held, start=start)
            loss, info = learner.loss(phi, state, task.support, task.query, k)
        moved = trees.subtract(phi.weights, learner.weights(phi, state))
        return Estimate(loss, MetaParams(moved, {}), learner.heritage(state) if self.moments else (), info)
