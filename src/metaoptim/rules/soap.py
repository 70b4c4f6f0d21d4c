"""SOAP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_fractions, check_numbers, check_positive
from metaoptim.core.gradients import hold
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.adam import zero
from metaoptim.rules.roots import root


@dataclass(frozen=True)
class SOAP:
    """Adam in the eigenbases Q of Shampoo's factors L ← b2·L + (1−b2)·g gᵀ, of which a weight has one for each axis.

    For a matrix, m ← b1·m + (1−b1)·g;  v ← b2·v + (1−b2)·(Q_lᵀ g Q_r)²;  u = −lr · (decay · w + Q_l (m' / (√v̂ + eps)) Q_rᵀ)
    with m' = Q_lᵀ m̂ Q_r. Weights of one dimension and scalars go by Adam itself. The first step fills the factors alone and
    moves nothing; every `every` steps the bases follow by a power iteration and a QR decomposition.

    The bases are constants of the meta-gradient, made of held gradients: the slope of an eigenvector is infinite where two
    eigenvalues are equal, as several of 0 are. All else is differentiated, the denominator as in `AdamW`. Where several
    eigenvalues are 0, rounding chooses the basis of their space, so that two ways of computing a run may come apart. The state
    is in float32 at least. Both decompositions are computed in every step, because the number of a step is a tensor.

    Source: Vyas and others 2024, https://arxiv.org/abs/2409.11321, algorithm 3.

    Deviations: eps is added to √v̂, where the published code adds it to √v; weights decay as in `AdamW`, where the published
    code decays those that have moved.

    Args:
        lr: step size.
        b1: decay of the first moment.
        b2: decay of the second moment and of the factors.
        eps: small constant of the denominator.
        decay: weight decay, times the step size.
        every: steps between two bases.
        largest: an axis that is longer has no factor, and keeps the basis that it has.
    """

    lr: float
    b1: float = 0.95
    b2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.01
    every: int = 10
    largest: int = 10_000

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)
        check_numbers(0, decay=self.decay)
        check_counts(every=self.every, largest=self.largest)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        t = zero(weights)
        m, v = ({n: torch.zeros_like(w, dtype=t.dtype) for n, w in weights.items()} for _ in range(2))
        factors = {f"{n}.{i}": t.new_zeros(size, size) for n, w in weights.items() for i, size in self._axes(w).items()}
        return {"m": m, "v": v, "factors": factors, "bases": dict(factors), "t": t}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        t = state["t"]
        begun = (t > 0).to(t.dtype)
        correction1, correction2 = 1 - self.b1 ** t.clamp(min=1), 1 - self.b2 ** t.clamp(min=1)
        updates, after = {}, {"m": {}, "v": {}, "factors": {}, "bases": {}, "t": t + 1}
        for n, w in weights.items():
            g, axes = grads[n].to(t.dtype), self._axes(w)
            bases = {i: state["bases"][f"{n}.{i}"] for i in axes}
            m = self.b1 * state["m"][n] + (1 - self.b1) * begun * g
            v = self.b2 * state["v"][n] + (1 - self.b2) * begun * turned(g, bases).square()
            scaled = turned(m, bases) / correction1 / (root(v / correction2) + self.eps)
            back = turned(scaled, {i: q.mT for i, q in bases.items()})
            updates[n] = (-self.lr * (back + self.decay * begun * w)).to(w.dtype)
            still = hold(g) if axes else g
            for i in axes:
                factor = self.b2 * state["factors"][f"{n}.{i}"] + (1 - self.b2) * gram(still, i)
                basis, v = followed(factor, bases[i], v, i, t, self.every)
                after["factors"][f"{n}.{i}"], after["bases"][f"{n}.{i}"] = factor, basis
            after["m"][n], after["v"][n] = m, v
        return updates, after

    def _axes(self, w: Tensor) -> dict[int, int]:
        """The axes that have a factor, and their sizes."""
        return {i: size for i, size in enumerate(w.shape) if size <= self.largest} if w.ndim > 1 else {}


def turned(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """x with its axis i in the coordinates of the columns of bases[i]."""
    for i, q in bases.items():
        x = (x.movedim(i, -1) @ q).movedim(-1, i)
    return x


def gram(x: Tensor, axis: int) -> Tensor:
    """The products of the slices of x along an axis, with each other."""
    rows = x.movedim(axis, 0).flatten(1)
    return rows @ rows.mT


def followed(factor: Tensor, basis: Tensor, v: Tensor, axis: int, t: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """The eigenbasis after step t, largest eigenvalue first, and v with its axis in that order."""
    image = factor @ basis
    order = (basis * image).sum(0).argsort(descending=True, stable=True)
    first, due = t == 0, (t > 0) & (t.remainder(every) == 0)
    fresh = torch.linalg.eigh(factor).eigenvectors.flip(1)
    moved = torch.linalg.qr(image.index_select(1, order)).Q
    basis = torch.where(first, fresh, torch.where(due, moved, basis))
    return basis, torch.where(due, v.index_select(axis, order), v)
