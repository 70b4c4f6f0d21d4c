"""Steps of an update rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_step
from metaoptim.core.types import Batch, Info, Loss, MetaParams, Params, Rule, State, Step, everything, read_out
from metaoptim.learners.network import Pooled

Model = Callable[[Params, Batch, Batch | None, Tensor], tuple[Tensor, Info]]
"""(weights, batch, support whose statistics count or None, k) -> mean loss, and what to report beside it."""


class Inner(NamedTuple):
    """The state of a gradient learner: the weights that adapt, and the rule's state."""

    fast: Params
    rule: State


@dataclass(frozen=True)
class GradientLearner:
    """K steps of an update rule on the support loss.

    Args:
        model: usually a `Network`; any function of (weights, batch, support, k) that returns a mean loss and what to report.
        rule, steps: how weights move, and how often.
        adapts: which weights move, by name.
        prox: λ of ½λ‖x − θ‖² added to the inner loss (iMAML, eq. 3).
        start: values that the task's own support set gives to some weights before the first step (ProtoMAML).
        batch_size: rows of the support per step, taken in the order in which the task brings them, cycling (None: all of
            them). Task families shuffle their supports, so that order is a draw without replacement.
        pooled: (model, φ, batch) -> the loss of examples of many tasks and what to report, for training that knows no tasks
            (`Joint`); none: that of θ.
    """

    model: Model
    rule: Rule
    steps: int
    adapts: Callable[[str], bool] = everything
    prox: float = 0.0
    start: Callable[[Params, Batch], Params] | None = None
    batch_size: int | None = None
    pooled: Pooled | None = None

    def __post_init__(self) -> None:
        check_step(self.rule)
        if self.steps < 0 or self.prox < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"steps={self.steps}, prox={self.prox}, batch_size={self.batch_size}: steps and prox must be >= 0, "
                "batch_size >= 1."
            )

    def length(self, support: Batch) -> int:
        return self.steps

    def init(self, phi: MetaParams, support: Batch) -> Inner:
        fast = trees.select(phi.weights, self.adapts)
        if self.start is not None:
            fast = fast | self.start(phi.weights, support)
        return Inner(fast, self.rule.init(phi.rule, fast))

    def inner(self, phi: MetaParams, state: Inner, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        batch = self.minibatch(support, k)

        def f(x: Params) -> tuple[Tensor, Info]:
            loss, info = self.model(phi.weights | x, batch, None, k)
            if self.prox:
                gap = trees.subtract(x, phi.weights)
                loss = loss + 0.5 * self.prox * trees.dot(gap, gap)
            return loss, info

        return f, state.fast

    def apply(self, phi: MetaParams, state: Inner, grads: Params, loss: Tensor, k: Tensor) -> Inner:
        updates, rule = self.rule.update(phi.rule, grads, state.rule, state.fast, Step(k, loss))
        return Inner(trees.add(state.fast, updates), rule)

    def loss(self, phi: MetaParams, state: Inner, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        if support is None:
            return self.together(phi, batch, k)
        return self.model(self.weights(phi, state), batch, support, k)

    def together(self, phi: MetaParams, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        """The loss of examples that nothing has adapted to."""
        if self.pooled is None:
            return self.model(phi.weights, batch, None, k)
        return self.pooled(self.model, phi, batch)

    def weights(self, phi: MetaParams, state: Inner) -> Params:
        return phi.weights | read_out(self.rule, phi.rule, state.rule, state.fast)

    def heritage(self, state: Inner) -> State:
        return state.rule

    def inherit(self, state: Inner, heritage: State) -> Inner:
        return state._replace(rule=heritage)

    def minibatch(self, support: Batch, k: Tensor) -> Batch:
        """The rows of step k."""
        rows, size = trees.flatten(support)[0].shape[0], self.batch_size
        if size is None or size >= rows:
            return support
        chosen = (k * size + torch.arange(size, device=k.device)) % rows
        return trees.map_tensors(lambda x: x.index_select(0, chosen), support)
