"""A learner that holds what an estimate claims to hold, for the loss whose derivative the estimate is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Info, Learner, Loss, MetaParams, Params, State


@dataclass(frozen=True)
class Held:
    """A learner for which all that passes no meta-gradient is as in a run from the fixed φ `base`, whatever φ it is given.

    Its loss is the function of φ whose derivative the estimate at `base` is. Runs go side by side: the one from `base`, and
    the one from the φ that is given, which takes over from it what is held.

    Args:
        learner: what runs.
        base: φ of the run that is held to.
        gradients: how inner gradients are taken. "held": those of the base run. "exact": at the given φ's own weights.
            "stepwise": with the given φ, at the base run's weights; of what doesn't adapt a step sees its own part alone, for
            a third run between the two, whose start alone is the given one's, is what steps begin with.
        until: inner steps that are as in the base run altogether.
    """

    learner: Learner
    base: MetaParams
    gradients: Literal["held", "exact", "stepwise"] = "held"
    until: int = 0

    @property
    def steps(self) -> int:
        return self.learner.steps

    def length(self, support: Batch) -> int | Tensor:
        return self.learner.length(support)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, phi: MetaParams, support: Batch) -> State:
        between = self.learner.init(self._still(phi), support)
        return self.learner.init(self._base(phi), support), between, self.learner.init(phi, support)

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        """Both runs' objectives in one: the gradient of a sum of functions of different weights holds those of both.

        Each is multiplied by a number that is 1; the gradient in that is the value.
        """
        there, x = self.learner.inner(self._base(phi), state[0], support, k)
        here, y = self.learner.inner(phi, state[0 if self.gradients == "stepwise" else 2], support, k)
        if not x:
            return there, x

        def both(points: Params) -> tuple[Tensor, Info]:
            first, info = there(_part(points, "base"))
            second, _ = here(_part(points, "own"))
            return first * points["value/base"] + second * points["value/own"], info

        one = torch.ones((), dtype=trees.flatten(x)[0].dtype, device=k.device)
        named = {f"base/{n}": p for n, p in x.items()} | {f"own/{n}": p for n, p in y.items()}
        return both, named | {"value/base": one, "value/own": one.clone()}

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        constants: list[Tensor] = []
        base, own, values = (_part(grads, prefix) for prefix in ("base", "own", "value"))
        given = base, values.get("base", loss)
        with gradients.recorded(constants):
            first = self.learner.apply(self._base(phi), state[0], *given, k)
        between, before = first, state[2]
        if self.gradients == "stepwise":
            with gradients.replayed(constants):
                between, before = self.learner.apply(self._still(phi), state[1], *given, k), state[1]
        with gradients.replayed(constants):
            mine = given if self.gradients == "held" else (own, values.get("own", loss))
            last = self.learner.apply(phi, before, *mine, k)
        if self.until:
            last = trees.zip_tensors(lambda a, b: torch.where(k < self.until, a, b), first, last)
        return first, between, last

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        return self.learner.loss(phi, state[2], support, batch, k)

    def weights(self, phi: MetaParams, state: State) -> Params:
        return self.learner.weights(phi, state[2])

    def heritage(self, state: State) -> State:
        return self.learner.heritage(state[2])

    def inherit(self, state: State, heritage: State) -> State:
        return *state[:2], self.learner.inherit(state[2], heritage)

    def _base(self, phi: MetaParams) -> MetaParams:
        """The base φ, in the order of the given one: in another, values that are held would change places."""
        return MetaParams({n: self.base.weights[n] for n in phi.weights}, self.base.rule)

    def _still(self, phi: MetaParams) -> MetaParams:
        """The base φ, with the start of the given one."""
        start = {n: p for n, p in phi.weights.items() if self.adapts(n)}
        return MetaParams(self._base(phi).weights | start, self.base.rule)


def _part(points: Params, prefix: str) -> Params:
    return {n.removeprefix(f"{prefix}/"): p for n, p in points.items() if n.startswith(f"{prefix}/")}
