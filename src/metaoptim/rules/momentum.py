"""Gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_fractions, check_positive
from metaoptim.core.types import Params, State, Step


@dataclass(frozen=True)
class Momentum:
    """m ← decay · m + g;  u = −lr · m  (Polyak 1964, as in `torch.optim.SGD`)."""

    lr: float
    decay: float = 0.9
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_fractions(decay=self.decay)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        m = {n: self.decay * state[n] + g for n, g in grads.items()}
        return {n: -self.lr * x for n, x in m.items()}, m
