"""Celo2's direction of a large weight as sums of products, for graphs that Inductor compiles.

The same numbers as `celo2.directions` up to rounding. Inductor makes loops of it, for means and for the rest, in which no
feature is ever written to memory; as matrix products all would be. What is small and the same for many weights is computed
`apart`, since Inductor would compute it anew for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.types import Params
from metaoptim.lopt.features import Moments
from metaoptim.lopt.pieces import factors

LEAST = 2**14  # elements of a weight below which a graph of products is compiled sooner, and as quick


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


_LIBRARY: Any = torch.library.Library("metaoptim", "DEF")  # type: ignore[no-untyped-call]  # a `custom_op` is called in 20 µs, this in 6
_LIBRARY.define("apart(Tensor x) -> Tensor")
_LIBRARY.impl("apart", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("metaoptim::apart", _copy, lib=_LIBRARY)


def apart(x: Tensor) -> Tensor:
    """The same numbers in memory of their own, computed before whatever uses them: a compiler can't look into this."""
    found: Tensor = torch.ops.metaoptim.apart(x)
    return found


def perceptron_of(psi: Params, x: Tensor, g: Tensor, seen: Moments, eps: float) -> Tensor:
    """The perceptron's first output (*shape) of weights x (*shape) with gradients g, of two or more dimensions (HWIO)."""
    shape = x.mT.shape

    def rows(t: Tensor) -> Tensor:
        """(…, *kernel, out, in), any of which may be 1, as rows of one matrix: Inductor makes one loop of two axes alone."""
        return t if len(shape) == 2 else t.expand(*t.shape[: -len(shape)], *shape[:-1], -1).flatten(-len(shape), -2)

    f, c = (rows(apart(t.mT)) for t in factors(seen, x.ndim))
    row, col = seen.row.mT, seen.col.mT
    x, g, m, v = (rows(t.mT) for t in (x, g, seen.m, seen.v.squeeze(0)))  # as they lie in memory
    w = {n: t.to(x.dtype) for n, t in psi.items()}
    inverse, factor = (v + 1e-8).rsqrt(), [a * b for a, b in zip(f, c, strict=True)]
    full = [g, g.clamp(-0.1, 0.1), x, *m, v, *(t * inverse for t in m), inverse, *(g * t for t in factor), g * inverse]
    full += [t * h for t, h in zip(m, factor, strict=True)]
    means = torch.stack([_mean_square(t.view(shape)) for t in full])
    first = rows(_folded(torch.cat([w["w0"][:15], w["w0"][27:]]), means, eps))
    of_row, of_col = (rows(_share(torch.cat([t, (t + 1e-8).rsqrt()]), w["w0"], at, eps)) for t, at in ((row, 15), (col, 18)))
    hidden = [_sum(r + b + c, full, own).relu() for own, r, b, c in zip(first, of_row, w["b0"], of_col, strict=True)]
    # One number for each row, though it is the same in all: Inductor makes one loop of sums that run over the same axes.
    b1, w2, b2 = (apart(t[..., None, None].expand(*t.shape, len(x), 1)) for t in (w["b1"], w["w2"][:, 0], w["b2"][0]))
    again = [_sum(b, hidden, own).relu() for own, b in zip(w["w1"].T, b1, strict=True)]
    return _sum(b2, again, w2).view(shape).mT


def normalised(x: Tensor, eps: float) -> Tensor:
    """A matrix, or one for every tap of a kernel, divided by its root mean square."""
    x = x.mT
    return (x * apart((_mean_square(x) + eps).rsqrt())).mT


def _mean_square(x: Tensor) -> Tensor:
    """Row by row: Inductor's loops are then those of the other sums, and one with them."""
    means: Tensor = x.square().mean(-1, keepdim=True).mean(-2, keepdim=True)
    return means


def _folded(w0: Tensor, means: Tensor, eps: float) -> Tensor:
    """Weights (units, features, *kernel, 1, 1) of features that are divided by the root of their mean squares."""
    folded: Tensor = apart(w0.T.reshape(*w0.T.shape, *[1] * (means.ndim - 1)) * (means + eps).rsqrt())
    return folded


def _share(compact: Tensor, w0: Tensor, at: int, eps: float) -> Tensor:
    """What features (6, …) that are constant along an axis add to the first layer, (units, …)."""
    folded = _folded(torch.cat([w0[at : at + 3], w0[at + 6 : at + 9]]), _mean_square(compact), eps)
    share: Tensor = apart((folded * compact).sum(1))
    return share


def _sum(bias: Tensor, inputs: Sequence[Tensor], weights: Any) -> Tensor:
    found = bias
    for x, w in zip(inputs, weights, strict=True):
        found = found + x * w
    return found
