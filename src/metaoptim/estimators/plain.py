"""What most estimators have in common: they carry nothing, and keep the whole graph."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from metaoptim.core.types import Call, Carry, Estimator, Learner, Memory, MetaParams, State, Task, directly


class Plain(Estimator):
    """An estimator that carries nothing and has one memory mode; the others say what they do differently."""

    memories: ClassVar[tuple[Memory, ...]] = ("graph",)

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        return self

    def lasts(self, learner: Learner) -> int:
        return 1

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Carry:
        return ()

    def inherit(self, carry: Carry) -> State:
        return ()
