"""Muon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_by_name, check_counts, check_fractions, check_numbers, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.adamw import AdamW
from metaoptim.rules.newton_schulz import orthogonalise


def no_head_or_embedding(name: str) -> bool:
    """Whether a weight belongs to a hidden layer, as far as its name tells."""
    return "head" not in name and "embed" not in name


@dataclass(frozen=True)
class Muon:
    """m ← μ·m + (1−μ)·g;  u = −lr · (decay · w + √max(1, rows/columns) · orthogonalised((1−μ)·g + μ·m)).

    That is for hidden matrices: weights of two or more dimensions, of a convolution as (out, in·kh·kw), whose name `hidden`
    accepts. All others go by `AdamW`: gains, biases, and the heads and embeddings that their names tell.

    Source: Jordan and others 2024, https://kellerjordan.github.io/posts/muon/; as `torch.optim.Muon`, whose decay is 0.1.

    Deviations: it is computed in the floats of the weights, where the published code goes down to bfloat16; rows and columns
    are those of the flattened matrix, where the published code reads kh/kw of a convolution. The authors leave the first and
    the last layer to AdamW: where names don't tell which these are, as in a plain `Sequential`, give `hidden`. All of it is
    differentiated.

    Args:
        lr: step size of the hidden matrices, in units of the spectral norm.
        momentum: μ.
        decay: weight decay of all weights, times the step size.
        adam_lr: step size of all other weights.
        b1: decay of their first moment.
        b2: decay of their second moment.
        eps: small constant of their denominator.
        iterations: Newton–Schulz steps of an orthogonalisation.
        hidden: whether a weight of two or more dimensions is a hidden one, from its name.
    """

    lr: float
    momentum: float = 0.95
    decay: float = 0.0
    adam_lr: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-10
    iterations: int = 5
    hidden: Callable[[str], bool] = no_head_or_embedding
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True
    decays_weights: ClassVar[bool] = True
    by_name: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, adam_lr=self.adam_lr, eps=self.eps)
        check_fractions(momentum=self.momentum, b1=self.b1, b2=self.b2)
        check_numbers(0, decay=self.decay)
        check_counts(iterations=self.iterations)
        check_by_name(hidden=self.hidden)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        matrices, others = self._split(weights)
        m = {n: torch.zeros_like(w) for n, w in matrices.items()}
        return {"m": m, "others": self._adamw.init(psi, others) if others else {}}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        matrices, others = self._split(grads)
        m = {n: self.momentum * state["m"][n] + (1 - self.momentum) * g for n, g in matrices.items()}
        updates, after = self._adamw.update(psi, others, state["others"], weights, step) if others else ({}, {})
        for n, g in matrices.items():
            ahead = ((1 - self.momentum) * g + self.momentum * m[n]).flatten(1)
            size = max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
            turned = size * orthogonalise(ahead, self.iterations)
            updates[n] = -self.lr * (turned.reshape(g.shape) + self.decay * weights[n])
        return updates, {"m": m, "others": after}

    @property
    def _adamw(self) -> AdamW:
        return AdamW(self.adam_lr, self.b1, self.b2, self.eps, self.decay)

    def _split(self, params: Params) -> tuple[Params, Params]:
        matrices = {n: x for n, x in params.items() if x.ndim >= 2 and self.hidden(n)}
        return matrices, {n: x for n, x in params.items() if n not in matrices}
