"""Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_fractions, check_positive
from metaoptim.core.gradients import hold
from metaoptim.core.types import Params, State, Step


@dataclass(frozen=True)
class Adam:
    """m ← b1·m + (1−b1)·g;  v ← b2·v + (1−b2)·g²;  u = −lr · m̂ / (√v̂ + eps)  (Kingma and Ba 2015).

    The denominator passes no meta-gradient: the slope of √v̂ is infinite at 0, where every unused weight is. The count of
    steps belongs to the state, so that moments which are carried from run to run keep their bias correction.
    """

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        m, v = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
        return {"m": m, "v": v, "t": next(iter(weights.values())).new_zeros(())}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        t = state["t"] + 1
        m = {n: self.b1 * state["m"][n] + (1 - self.b1) * g for n, g in grads.items()}
        v = {n: self.b2 * state["v"][n] + (1 - self.b2) * g.square() for n, g in grads.items()}

        def direction(n: str) -> Tensor:
            root: Tensor = hold((v[n] / (1 - self.b2**t)).sqrt() + self.eps)
            found: Tensor = m[n] / (1 - self.b1**t) / root
            return found

        return {n: -self.lr * direction(n) for n in m}, {"m": m, "v": v, "t": t}
