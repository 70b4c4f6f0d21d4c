"""Learnt step sizes: one for each inner step, and for each group of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.layer_step_sizes import at


def all_weights(name: str) -> str:
    """The group of every weight, where all are one."""
    return "all"


@dataclass(frozen=True)
class Schedule:
    """Scales what it is given by η_k = exp(ψ_k), learnt, for use after another rule: `chain(Momentum(1.0), Schedule(0.1, 50))`.

    ψ is {log_lr.GROUP: (steps,)}; the logarithm keeps step sizes positive, and a step on it changes them by a factor.

    Args:
        lr: every η at the start.
        steps: how many η a group has: one per inner step k, of which later steps share the last; 1 for a constant.
        group: from a weight's name to its group's.
    """

    lr: float
    steps: int = 1
    group: Callable[[str], str] = all_weights
    takes_step: ClassVar[bool] = False

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_counts(steps=self.steps)

    @property
    def separable(self) -> bool:
        return self.group is all_weights

    @property
    def by_name(self) -> bool:
        return self.group is not all_weights

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        like = {self.group(n): w for n, w in weights.items()}
        return {f"log_lr.{g}": w.new_full((self.steps,), self.lr).log() for g, w in like.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        lr = {name: at(x, step.k).exp() for name, x in psi.items()}
        return {n: lr[f"log_lr.{self.group(n)}"] * g for n, g in grads.items()}, state
