"""AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_fractions, check_numbers, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.adam import moments, start_of_moments
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
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True
    decays_weights: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)
        check_numbers(0, decay=self.decay)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return start_of_moments(weights)

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        m, v, state = moments(grads, state, self.b1, self.b2)
        return {n: -self.lr * (m[n] / (root(v[n]) + self.eps) + self.decay * weights[n]) for n in m}, state
