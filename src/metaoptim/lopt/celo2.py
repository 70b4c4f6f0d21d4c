"""Celo2: a tiny perceptron gives matrices a direction, which is orthogonalised; vectors go by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_by_name, check_flags, check_numbers, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.lopt import fused, pieces
from metaoptim.lopt.checks import first
from metaoptim.lopt.features import HORIZONS, Decays, Moments, after, factor, normalised, raised, start_of_moments, together
from metaoptim.lopt.layout import from_hwio, to_hwio
from metaoptim.lopt.perceptron import perceptron, start_of_perceptron
from metaoptim.rules.adamw import AdamW
from metaoptim.rules.newton_schulz import orthogonalise

TINY = 1e-9
Direct = Callable[[Params, Tensor, Tensor, Moments, int, bool], tuple[Tensor, Moments]]


@dataclass(frozen=True)
class Celo2:
    """u = −lr · (s + decay · x), s = N(NS(d)), d = the first output of a perceptron 30 → 8 → 8 → 3 of features of a weight x.

    NS is Newton–Schulz's iteration and N divides by the root mean square, both over the axes (in, out) of a weight. The 30
    features of x with gradient g, each under N: g, clip(g, ±.1), x; m (decays .9, .99, .999); v (.95); m/√v, 1/√v; g·f, g/√v;
    row, col, 1/√row, 1/√col (.9, .99, .999); m·f, with Adafactor's factor f (see `features`); a vector has the first 15.
    ψ: w0, b0, w1, b1, w2, b2, 347 numbers; what is theirs of the second and third outputs is not used.

    Source: Moudgil et al. 2026, https://arxiv.org/abs/2602.19142. Gradients beyond ±1000 count as ±1000, of
    the weights that go by AdamW too.

    Args:
        lr: step size; a schedule of it stands outside: `chain(Celo2(lr=1.0), Schedule(…))`.
        decay: weight decay.
        orthogonal: whether there is NS; without it, and with `by_adam` of nothing, it is the paper's Celo2-base.
        by_adam: whether the weight of a name goes by AdamW(adam_ratio · lr, .9, .95); none: vectors and scalars do.
            Embeddings should too.
        adam_ratio: AdamW's step size as a multiple of `lr`.
    """

    lr: float = 1e-3
    decay: float = 0.0
    orthogonal: bool = True
    by_adam: Callable[[str], bool] | None = None
    adam_ratio: float = 20.0
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True
    decays_weights: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, adam_ratio=self.adam_ratio)
        check_numbers(0, decay=self.decay)
        check_flags(orthogonal=self.orthogonal)
        check_by_name(by_adam=self.by_adam)

    @property
    def by_name(self) -> bool:
        return self.by_adam is not None

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return start_of_perceptron((30, 8, 8, 3), first(weights), generator)

    def init(self, psi: Params, weights: Params) -> State:
        by_adam, others = self._parted(raised(weights), weights)
        moments = {n: start_of_moments(to_hwio(x, x.ndim), max(x.ndim, 1)) for n, x in others.items()}
        moments = {n: Moments(*map(pieces.dense, t)) if t.v.ndim > 2 else t for n, t in moments.items()}
        return {"adam": self._adam.init({}, by_adam) if by_adam else {}, "celo": moments}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return self._by(plain, psi, grads, state, weights, step)

    def quick(
        self, psi: Params, grads: Params, state: State, weights: Params, step: Step, compiled: bool = False
    ) -> tuple[Params, State]:
        """The same as `update`, for those who differentiate nothing: large weights are moved piece by piece, or all fused."""
        return self._by(as_sums if compiled else in_pieces, psi, grads, state, weights, step)

    def _by(
        self, direct: Direct, psi: Params, grads: Params, state: State, weights: Params, step: Step
    ) -> tuple[Params, State]:
        by_adam, others = self._parted({n: g.clamp(-1000, 1000) for n, g in raised(grads).items()}, weights)
        x = raised(weights)
        updates, adam = self._adam.update({}, by_adam, state["adam"], x, step) if by_adam else ({}, {})
        celo = {}
        for n, g in others.items():
            dim = max(g.ndim, 1)
            here, g = (to_hwio(t, g.ndim).unsqueeze(0) for t in (x[n], g))
            s, celo[n] = direct(psi, here, g, state["celo"][n], dim, self.orthogonal)
            s = from_hwio(s, weights[n].ndim)
            updates[n] = -self.lr * (s + self.decay * x[n] if self.decay else s)
        return {n: updates[n].to(w.dtype) for n, w in weights.items() if n in updates}, {"adam": adam, "celo": celo}

    @property
    def _adam(self) -> AdamW:
        return AdamW(self.adam_ratio * self.lr, 0.9, 0.95, decay=self.decay)

    def _parted(self, tensors: Params, weights: Params) -> tuple[Params, Params]:
        """Those of the weights that go by AdamW, and the others."""
        adams = {n for n, w in weights.items() if (self.by_adam(n) if self.by_adam else w.ndim < 2)}
        return {n: t for n, t in tensors.items() if n in adams}, {n: t for n, t in tensors.items() if n not in adams}


def plain(psi: Params, x: Tensor, g: Tensor, old: Moments, dim: int, orthogonal: bool) -> tuple[Tensor, Moments]:
    """s (*shape) of weights x (1, *shape) with gradients g, and their moments."""
    seen = after(old, g, _decays(g), dim)
    return directions(psi, x, g, seen, dim, orthogonal), seen


def in_pieces(psi: Params, x: Tensor, g: Tensor, old: Moments, dim: int, orthogonal: bool) -> tuple[Tensor, Moments]:
    """The same piece by piece, where that is quicker."""
    if dim < 2 or pieces.few(x):
        return plain(psi, x, g, old, dim, orthogonal)
    x, g = pieces.dense(x), pieces.dense(g)
    seen = pieces.moments_after(old, g, _decays(g))
    s = pieces.perceptron_of(psi, x.squeeze(0), g.squeeze(0), seen, TINY)
    return normalised(orthogonalise(s) if orthogonal else s, (-2, -1), TINY), seen


def as_sums(psi: Params, x: Tensor, g: Tensor, old: Moments, dim: int, orthogonal: bool) -> tuple[Tensor, Moments]:
    """The same for a compiler, which fuses sums of products."""
    if dim < 2 or x.numel() < fused.LEAST:
        return plain(psi, x, g, old, dim, orthogonal)
    if dim > 2:  # loops over tensors of two orders in memory are not vectorised
        x, g = (fused.apart(t.mT).mT for t in (x, g))
    seen = Moments(*map(pieces.dense, after(Moments(*map(pieces.dense, old)), g, _decays(g), dim)))
    s = fused.perceptron_of(psi, x.squeeze(0), g.squeeze(0), seen, TINY)
    return fused.normalised(orthogonalise(s) if orthogonal else s, TINY), seen


def directions(psi: Params, x: Tensor, g: Tensor, seen: Moments, dim: int, orthogonal: bool) -> Tensor:
    """s (…, *shape) of weights x with gradients g (1, …, *shape), of which there may be batches."""
    m, v, row, col = seen
    inverse = (v + 1e-8).rsqrt()
    features = [g, g.clamp(-0.1, 0.1), x, m, v, m * inverse, inverse, g * factor(seen, dim), g * inverse]
    if dim > 1:
        features += [row, col, (row + 1e-8).rsqrt(), (col + 1e-8).rsqrt(), m * factor(seen, dim)]
    axes = (-2, -1)[-dim:]
    inputs = normalised(together(features, g), axes, TINY)
    s = perceptron(psi | {"w0": psi["w0"][: len(inputs)]}, inputs.flatten(1))[0].view(g.shape[1:])
    return normalised(orthogonalise(s) if orthogonal and dim > 1 else s, axes, TINY)


def _decays(like: Tensor) -> Decays:
    horizons, v = (torch.tensor(d, dtype=like.dtype, device=like.device) for d in (HORIZONS, (0.95,)))
    return Decays(horizons, v, horizons)
