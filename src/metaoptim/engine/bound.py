"""A learner in one task, as the engine hands it to an estimator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from metaoptim.core.callers import is_ours
from metaoptim.core.types import Batch, Info, Learner, Loss, MetaParams, Params, State
from metaoptim.nn import noise
from metaoptim.nn.written_out import keyed

OF_RULES = 1 << 29  # stages of noise that no model has


@dataclass(frozen=True)
class Bound:
    """A learner that knows the weights which are not learnt, and draws random numbers as a function of the task's key.

    An estimator sees the learnt part of φ alone, so that it takes no gradient of the rest; here the two come together. What
    is drawn depends on the key, on the step, and on whether the step is taken or judged, by the model or by the rule.
    """

    learner: Learner
    fixed: Params
    key: Tensor

    @property
    def steps(self) -> int:
        return self.learner.steps

    def length(self, support: Batch) -> int | Tensor:
        return self.learner.length(support)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, phi: MetaParams, support: Batch) -> State:
        with noise(self.key), self._keyed():
            return self.learner.init(self._whole(phi), support)

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        f, x = self.learner.inner(self._whole(phi), state, support, k)

        def drawing(x: Params) -> tuple[Tensor, Info]:
            with noise(self.key, k, 1):
                return f(x)

        return drawing, x

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        with noise(self.key, k, OF_RULES), self._keyed():
            return self.learner.apply(self._whole(phi), state, grads, loss, k)

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        with noise(self.key, k, 2):
            return self.learner.loss(self._whole(phi), state, support, batch, k)

    def weights(self, phi: MetaParams, state: State) -> Params:
        return self.learner.weights(self._whole(phi), state)

    def heritage(self, state: State) -> State:
        return self.learner.heritage(state)

    def inherit(self, state: State, heritage: State) -> State:
        return self.learner.inherit(state, heritage)

    def _keyed(self) -> AbstractContextManager[None]:
        """Torch's functions draw by the key in code that isn't ours; ours is spared the small cost."""
        return nullcontext() if is_ours(self.learner) else keyed()

    def _whole(self, phi: MetaParams) -> MetaParams:
        return MetaParams(self.fixed | phi.weights, phi.rule) if self.fixed else phi
