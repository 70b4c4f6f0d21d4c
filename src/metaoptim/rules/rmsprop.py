"""RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_fractions, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.roots import root


@dataclass(frozen=True)
class RMSprop:
    """v ← decay · v + (1 − decay) · g²;  u = −lr · g / (√v + eps)  (Tieleman and Hinton 2012, as in `torch.optim.RMSprop`).

    The denominator is differentiated too. Where v is 0, its slope is taken for 0.
    """

    lr: float
    decay: float = 0.99
    eps: float = 1e-8
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(decay=self.decay)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        v = {n: self.decay * state[n] + (1 - self.decay) * g.square() for n, g in grads.items()}
        return {n: -self.lr * g / (root(v[n]) + self.eps) for n, g in grads.items()}, v
