"""What most estimators have in common: they carry nothing, and keep the whole graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.objectives import Objective
from metaoptim.core.types import Call, Carry, Estimator, Learner, Memory, MetaParams, State, Task, directly


class Plain(Estimator):
    """An estimator that carries nothing and has one memory mode; the others say what they do differently."""

    memories: ClassVar[tuple[Memory, ...]] = ("graph",)

    __repr__ = brief

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        return self

    def lasts(self, learner: Learner) -> int:
        return 1

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Carry:
        return ()

    def inherit(self, carry: Carry) -> State:
        return ()


def judging(estimator: Estimator, objective: Objective | None) -> Estimator:
    """The estimator with another objective (None: its own); a ValueError where it leaves no choice."""
    if objective is None:
        return estimator
    given: Any = estimator
    if "objective" not in getattr(given, "__dataclass_fields__", {}):
        raise ValueError(
            f"objective={brief(objective)}: {type(estimator).__name__} says itself which states it judges; leave objective "
            "out, or use Unroll."
        )
    changed: Estimator = replace(given, objective=objective)
    return changed
