"""A formula in place of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from metaoptim.core.types import Batch, Info, Loss, MetaParams, Params, State
from metaoptim.learners.network import Network, Pooled, pair


def logarithms(weights: Params, **values: float) -> Params:
    """ψ of positive numbers, {log_NAME: their logarithms}, of the type of the weights and where they are."""
    like = next(iter(weights.values()))
    return {f"log_{name}": like.new_tensor(math.log(value)) for name, value in values.items()}


def _no_objective(x: Params) -> tuple[Tensor, Info]:
    raise ValueError("a closed form has no inner objective: its inner loop takes no gradient.")


@dataclass(frozen=True)
class ClosedForm:
    """A learner whose inner loop is a formula.

    Args:
        model: the network whose features it reads, and whose loss judges its predictions.
        fit: (network, φ, support) -> state, a tree of tensors.
        predict: (network, φ, state, support, inputs (B, …)) -> outputs, such as logits (B, N).
        steps: 0; a closed form is done before the first step, and further ones change nothing.
        pooled: the loss of examples of many tasks, for training that knows no tasks (`Joint`).
    """

    model: Network
    fit: Callable[[Network, MetaParams, Batch], State]
    predict: Callable[[Network, MetaParams, State, Batch, Tensor], Tensor]
    steps: int = 0
    pooled: Pooled | None = None

    def length(self, support: Batch) -> int:
        return self.steps

    def adapts(self, name: str) -> bool:
        return False

    def init(self, phi: MetaParams, support: Batch) -> State:
        return self.fit(self.model, phi, support)

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        return _no_objective, {}

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        return state

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        if support is None:
            return self.together(phi, batch)
        x, y = pair(batch)
        return self.model.judge(self.predict(self.model, phi, state, support, x), y)

    def together(self, phi: MetaParams, batch: Batch) -> tuple[Tensor, Info]:
        """The loss of examples that nothing was fitted to."""
        if self.pooled is None:
            raise ValueError("this closed form is fitted to a task's support set, and can't be trained without: use Unroll.")
        return self.pooled(self.model, phi, batch)

    def weights(self, phi: MetaParams, state: State) -> Params:
        return phi.weights

    def heritage(self, state: State) -> State:
        return ()

    def inherit(self, state: State, heritage: State) -> State:
        return state
