"""A learner that holds what an estimate claims to hold, for the loss whose derivative the estimate is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Info, Learner, Loss, MetaParams, Params, State


@dataclass(frozen=True)
class Held:
    """A learner for which all that passes no meta-gradient is as in a run from the fixed φ `base`, whatever φ it is given:
    what a step holds on purpose and, unless `exact`, its inner gradients.

    Its loss is the function of φ whose derivative the estimate at `base` is. Two runs go side by side: the one from `base`,
    and the one from the φ that is given, which takes over from it what is held.
    """

    learner: Learner
    base: MetaParams
    exact: bool = False

    @property
    def steps(self) -> int:
        return self.learner.steps

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, phi: MetaParams, support: Batch) -> State:
        return self.learner.init(self.base, support), self.learner.init(phi, support)

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        """Both runs' objectives in one: the gradient of a sum of functions of different weights holds those of both.

        Each is multiplied by a number that is 1; the gradient in that is the value.
        """
        there, x = self.learner.inner(self.base, state[0], support, k)
        here, y = self.learner.inner(phi, state[1], support, k)
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
        with gradients.recorded(constants):
            first = self.learner.apply(self.base, state[0], base, values.get("base", loss), k)
        if not self.exact:
            own, values = base, {"own": values.get("base", loss)}
        with gradients.replayed(constants):
            second = self.learner.apply(phi, state[1], own, values.get("own", loss), k)
        return first, second

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        return self.learner.loss(phi, state[1], support, batch, k)

    def weights(self, phi: MetaParams, state: State) -> Params:
        return self.learner.weights(phi, state[1])

    def heritage(self, state: State) -> State:
        return self.learner.heritage(state[1])

    def inherit(self, state: State, heritage: State) -> State:
        return state[0], self.learner.inherit(state[1], heritage)


def _part(points: Params, prefix: str) -> Params:
    return {n.removeprefix(f"{prefix}/"): p for n, p in points.items() if n.startswith(f"{prefix}/")}
