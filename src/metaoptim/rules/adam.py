"""Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return start_of_moments(weights)

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        m, v, state = moments(grads, state, self.b1, self.b2)
        return {n: -self.lr * (m[n] / hold(v[n].sqrt() + self.eps)) for n in m}, state


def start_of_moments(weights: Params) -> State:
    """Both moments and the count of steps, 0."""
    m, v = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    return {"m": m, "v": v, "t": zero(weights)}


def zero(weights: Params) -> Tensor:
    """A count at its start, 0-dim, in float32 at least: in bfloat16 b2 is 1, and counting ends at 256."""
    first = next(iter(weights.values()))
    return first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))


def moments(grads: Params, state: State, b1: float, b2: float) -> tuple[Params, Params, State]:
    """m̂ and v̂, and the state after them."""
    t = state["t"] + 1
    m = {n: b1 * state["m"][n] + (1 - b1) * g for n, g in grads.items()}
    v = {n: b2 * state["v"][n] + (1 - b2) * g.square() for n, g in grads.items()}
    seen, seen2 = 1 - b1**t, 1 - b2**t  # how much of a mean's weight is on gradients
    corrected = {n: x / seen.to(x.dtype) for n, x in m.items()}, {n: x / seen2.to(x.dtype) for n, x in v.items()}
    return *corrected, {"m": m, "v": v, "t": t}
