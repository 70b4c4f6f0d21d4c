"""∇φ by backpropagation through the last W steps of the inner run; the steps before them are held constant.

    ∇φ loss(φ, s_K(φ), Q)          with s_{K−W} held constant

Time and memory of the gradient are those of W steps, however long the run; the bias falls exponentially with W where the inner
objective is strongly convex near the end. Shaban, Cheng, Hatch and Boots 2019, https://arxiv.org/abs/1810.10667.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_counts
from metaoptim.core.gradients import exact, held, outermost
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Carry, Claim, Clock, Estimate, Estimator, Info, Learner, MetaParams, Task
from metaoptim.estimators.plain import Plain
from metaoptim.estimators.unroll import Unroll


@dataclass(frozen=True, repr=False)
class LastSteps(Plain):
    """window: the steps W at the end of the run that are differentiated through; all before them count as given."""

    window: int
    claim: ClassVar[Claim] = "truncated"
    target: ClassVar[Estimator] = Unroll()

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_counts(window=self.window)
        if self.window > learner.steps:
            raise ValueError(f"window={self.window}: a run has {learner.steps} inner steps, of which it must be a part.")
        if self.window < learner.steps:
            refuse_start(learner, learnt, f"LastSteps(window={self.window})")

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        start = None
        if before := learner.steps - self.window:
            *_, (k, state) = inner_loop(learner, phi, task.support, held, before)
            start = (k, trees.map_tensors(Tensor.detach, state))

        def outer(phi: MetaParams) -> tuple[Tensor, Info]:
            *_, (k, state) = inner_loop(learner, phi, task.support, exact, self.window, start)
            return learner.loss(phi, state, task.support, task.query, k)

        gradient, (loss, info) = outermost(outer, phi)
        return Estimate(loss, gradient, carry, info)


def refuse_start(learner: Learner, learnt: MetaParams, who: str) -> None:
    """A ValueError where a start is to be learnt, by an estimator that doesn't see it."""
    if start := [n for n in learnt.weights if learner.adapts(n)]:
        raise ValueError(
            f"{who} sees the end of a run alone, so that it can't train where the run starts ({start[0]}, …): learn weights "
            "that don't adapt and the rule's own parameters, or use Unroll."
        )
