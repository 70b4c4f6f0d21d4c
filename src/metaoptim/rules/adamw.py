"""AdamW."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaoptim.core.checks import check_fractions, check_numbers, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.roots import root


@dataclass(frozen=True)
class AdamW:
    """u = −lr · (decay · w + m̂ / (√v̂ + eps)) with Adam's m̂ and v̂  (Loshchilov and Hutter 2019, as `torch.optim.AdamW`).

    The denominator is differentiated too, which `Adam` holds. Where v is 0, its slope is taken for 0. The count of steps
    belongs to the state, as in `Adam`.
    """

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.01

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)
        check_numbers(0, decay=self.decay)

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
            found: Tensor = m[n] / (1 - self.b1**t) / (root(v[n] / (1 - self.b2**t)) + self.eps)
            return found + self.decay * weights[n]

        return {n: -self.lr * direction(n) for n in m}, {"m": m, "v": v, "t": t}
