"""What training without tasks descends: the loss of all their examples, to which nothing has adapted.

    ∇φ loss(φ, S ∪ Q)

There is no inner run; tasks are adapted to at validation and at test alone. Caruana 1997,
https://doi.org/10.1023/A:1007379606734.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.gradients import outermost
from metaoptim.core.types import Carry, Claim, Clock, Estimate, Info, Learner, MetaParams, Task
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class Joint(Plain):
    """The gradient of φ itself as a model of the support and the query together, or of what the learner calls `pooled`."""

    claim: ClassVar[Claim] = "exact"

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        if learnt.rule and getattr(learner, "pooled", None) is None:
            raise ValueError(
                f"without an inner run the rule's own parameters ({min(learnt.rule)}, …) get no gradient; use Unroll, or a "
                "rule without any, such as SGD."
            )

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        examples = trees.cat([task.support, task.query])

        def outer(phi: MetaParams) -> tuple[Tensor, Info]:
            return learner.loss(phi, (), None, examples, torch.zeros_like(clock.outer_step))

        gradient, (loss, info) = outermost(outer, phi)
        return Estimate(loss, gradient, carry, info)
