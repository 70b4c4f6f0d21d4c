"""Another estimator, whose gradient counts as zero where it is not finite, and is clipped where it is long, task by task.

Long inner runs diverge now and then, and one that did must not take the others' gradients along. What was left out is reported:
`discarded` is the share of tasks whose gradient was not finite, `clipped` of those whose gradient was shortened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import (
    Call,
    Carry,
    Claim,
    Clock,
    Estimate,
    Estimator,
    Learner,
    Memory,
    MetaParams,
    State,
    Task,
    directly,
)
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class Guarded(Plain):
    """Args:
    estimator: the one that is guarded; its claim is this one's.
    clip: largest norm of one task's gradient; longer ones are scaled down (None: none is).
    """

    estimator: Estimator
    clip: float | None = None

    @property
    def memories(self) -> tuple[Memory, ...]:  # type: ignore[override]  # for others it is known of the class
        return self.estimator.memories

    @property
    def claim(self) -> Claim:
        return self.estimator.claim

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        return replace(self, estimator=self.estimator.keeping(memory, call))

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: the largest norm of a task's gradient must be positive.")
        self.estimator.check(learner, learnt)

    def lasts(self, learner: Learner) -> int:
        return self.estimator.lasts(learner)

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Carry:
        return self.estimator.init(learner, phi, task, key)

    def inherit(self, carry: Carry) -> State:
        return self.estimator.inherit(carry)

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        estimate = self.estimator(learner, phi, task, carry, clock)
        size = torch.stack([g.square().sum() for g in trees.flatten(estimate.grad)]).sum().sqrt()
        finite = torch.isfinite(size)
        factor = torch.ones_like(size) if self.clip is None else (self.clip / size).clamp(max=1.0)
        grad = trees.map_tensors(lambda g: torch.where(finite, g * factor, 0.0), estimate.grad)
        told = {"discarded": (~finite).to(size.dtype)}
        if self.clip is not None:
            told["clipped"] = (finite & (factor < 1)).to(size.dtype)
        return estimate._replace(grad=grad, info={**estimate.info, **told})


def unguarded(estimator: Estimator) -> Estimator:
    """What a guard guards; another estimator itself."""
    return estimator.estimator if isinstance(estimator, Guarded) else estimator
