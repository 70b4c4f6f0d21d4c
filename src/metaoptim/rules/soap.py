"""SOAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    with m' = Q_lᵀ m̂ Q_r. Weights of one dimension and scalars go by Adam itself. The bases are the identity in the first step,
    the eigenvectors of the factors after it, and follow these every `every` steps by a power iteration and a QR decomposition.

    The bases are constants of the meta-gradient, made of held gradients: the slope of an eigenvector is infinite where two
    eigenvalues are equal, as several of 0 are. All else is differentiated, the denominator as in `AdamW`. Where several
    eigenvalues are 0, rounding chooses the basis of their space, so that two ways of computing a run may come apart. The state
    is in float32 at least. Both decompositions are computed in every step, because the number of a step is a tensor.

    Source: Vyas and others 2024, https://arxiv.org/abs/2409.11321, algorithms 3 and 4.

    Deviations: the published code takes no first step, and begins with the eigenvectors of the first gradient's factors. Here
    the first step is Adam's. A run of few steps can't spare one; and where gradients are not drawn anew the second would equal
    the first, most of whose coordinates in the new bases are rounding about 0, which Adam would scale to full size. eps is
    added to √v̂, where the published code adds it to √v; weights decay as in `AdamW`, where that code decays them once moved.

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
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True
    decays_weights: ClassVar[bool] = True

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
        sizes = {f"{n}.{i}": size for n, w in weights.items() for i, size in self._axes(w).items()}
        bases = {name: torch.eye(size, dtype=t.dtype, device=t.device) for name, size in sizes.items()}
        return {"m": m, "v": v, "factors": {name: torch.zeros_like(q) for name, q in bases.items()}, "bases": bases, "t": t}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        t = state["t"] + 1
        updates, m, v, factors, bases = {}, {}, {}, {}, {}
        for n, w in weights.items():
            g, names = grads[n].to(t.dtype), {i: f"{n}.{i}" for i in self._axes(w)}
            own = {i: state["bases"][name] for i, name in names.items()}
            m[n] = self.b1 * state["m"][n] + (1 - self.b1) * g
            v[n] = self.b2 * state["v"][n] + (1 - self.b2) * turned(g, own).square()
            scaled = turned(m[n], own) / (1 - self.b1**t) / (root(v[n] / (1 - self.b2**t)) + self.eps)
            back = turned(scaled, {i: q.mT for i, q in own.items()})
            updates[n] = (-self.lr * (back + self.decay * w)).to(w.dtype)
            still = hold(g) if names else g
            for i, name in names.items():
                factors[name] = self.b2 * state["factors"][name] + (1 - self.b2) * gram(still, i)
                bases[name], v[n] = followed(factors[name], own[i], v[n], i, t, self.every)
        return updates, {"m": m, "v": v, "factors": factors, "bases": bases, "t": t}

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
    first, due = t == 1, (t > 1) & (t.remainder(every) == 0)
    fresh = torch.linalg.eigh(factor).eigenvectors.flip(1)
    moved = torch.linalg.qr(image.index_select(1, order)).Q
    basis = torch.where(first, fresh, torch.where(due, moved, basis))
    return basis, torch.where(due, v.index_select(axis, order), v)
