"""A learnt step size for every layer and inner step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import Params, State, Step


@dataclass(frozen=True)
class LayerStepSizes:
    """u = −α_(l,k) · g with ψ = {LAYER.lr: (α_(l,0) … α_(l,K−1))}, one for each layer l and step k, unconstrained.

    Antoniou, Edwards and Storkey 2019, section 4 (LSLR). A layer is the module that owns a weight. Steps beyond `steps` go on
    with the last step size.
    """

    lr: float
    steps: int
    by_name: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_counts(steps=self.steps)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {size_of(n): w.new_full((self.steps,), self.lr) for n, w in weights.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return {n: -at(psi[size_of(n)], step.k) * g for n, g in grads.items()}, state


def size_of(name: str) -> str:
    """The name, in ψ, of the step sizes of a weight's layer."""
    layer = name.rpartition(".")[0]
    return f"{layer}.lr" if layer else "lr"


def at(table: Tensor, k: Tensor) -> Tensor:
    """Row k of a table with a row for each inner step; beyond its end the last one."""
    return table.index_select(0, k.clamp(max=table.shape[0] - 1).reshape(1)).squeeze(0)
