"""Gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_numbers
from metaoptim.core.types import Params, State, Step


@dataclass(frozen=True)
class Clip:
    """Gradients scaled down to a Euclidean norm over all weights together, or clamped element by element to ±value."""

    norm: float | None = None
    value: float | None = None
    takes_step: ClassVar[bool] = False

    __repr__ = brief

    def __post_init__(self) -> None:
        check_numbers(norm=self.norm, value=self.value)
        if (self.norm is None) == (self.value is None) or self._bound <= 0:
            raise ValueError(
                f"clip takes norm= or value=, one of them and positive; found norm={self.norm}, value={self.value}."
            )

    @property
    def _bound(self) -> float:
        return self.norm or self.value or 0.0

    @property
    def separable(self) -> bool:
        return self.norm is None

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        bound = self._bound
        if self.norm is None:
            return {n: g.clamp(-bound, bound) for n, g in grads.items()}, state
        # The squared norm is floored before the root: at 0 the root's slope would be infinite.
        size = trees.dot(grads, grads).clamp(min=bound**2).sqrt()
        return {n: g * (bound / size) for n, g in grads.items()}, state
