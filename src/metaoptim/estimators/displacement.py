"""The way that the weights went in the inner run, taken for a gradient: θ − θ_K.

A step of size ε along it is θ ← θ + ε (θ_K − θ). Nichol, Achiam and Schulman 2018, https://arxiv.org/abs/1803.02999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Carry, Estimate, Learner, Memory, Meta, Run, State, Task, directly


@dataclass(frozen=True)
class Displacement:
    """moments: whether the rule's state goes on from one outer step to the next, or starts anew with every task.

    Carried state belongs to a task slot: slot i of a batch goes on from slot i of the batch before it.
    """

    moments: bool = False
    memories: ClassVar[tuple[Memory, ...]] = ("graph",)  # nothing is differentiated through, so nothing is kept

    def keeping(self, memory: Memory, run: Run = directly) -> Displacement:
        return self

    def check(self, learner: Learner, learnt: Meta) -> None:
        if learnt.rule:
            raise ValueError(
                f"the displacement of the weights says nothing about the rule's own parameters ({min(learnt.rule)}, …); "
                "use Unroll, or a rule without any, such as sgd."
            )
        shared = [n for n in learnt.weights if not learner.adapts(n)]
        if shared:
            raise ValueError(
                f"the displacement is zero for weights that do not adapt, such as {shared[0]}; let every learnt weight "
                "adapt, or use Unroll."
            )

    def init(self, learner: Learner, meta: Meta) -> Carry:
        return ()

    def start(self, learner: Learner, meta: Meta, support: Batch, carry: Carry) -> State:
        return learner.init(meta, support, carry)

    def __call__(self, learner: Learner, meta: Meta, task: Task, carry: Carry) -> Estimate:
        with torch.no_grad():
            state = self.start(learner, meta, task.support, carry)
            for k in range(learner.steps):
                state = learner.step(meta, state, task.support, k, gradients.outermost)
            loss, info = learner.loss(meta, state, task.query, learner.steps)
        moved = trees.subtract(meta.weights, learner.weights(meta, state))
        return Estimate(loss, Meta(moved, {}), learner.memory(state) if self.moments else (), info)
