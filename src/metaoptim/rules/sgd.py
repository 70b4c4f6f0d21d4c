"""Gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_positive
from metaoptim.core.types import Params, State, Step


@dataclass(frozen=True)
class SGD:
    """u = −lr · g."""

    lr: float
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return {n: -self.lr * g for n, g in grads.items()}, state
