"""Celo2's direction of a large weight as sums of products, for graphs that Inductor compiles.

The same numbers as `celo2.directions` up to rounding. Inductor makes loops of it, for means and for the rest, in which no
feature is ever written to memory; as matrix products all would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.types import Params
from metaoptim.lopt.features import Moments
from metaoptim.lopt.pieces import FULL, factors

ROWS, COLUMNS = (0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)  # of the features that are constant along an axis
LEAST = 2**14  # elements of a weight below which a graph of products is compiled sooner, and as quick


def perceptron_of(psi: Params, x: Tensor, g: Tensor, seen: Moments, eps: float) -> Tensor:
    """The perceptron's first output (*shape) of weights x (*shape) with gradients g, of two or more dimensions (HWIO)."""
    w = {n: t.to(x.dtype) for n, t in psi.items()}
    m, row, col, f, c = (t.unbind() for t in (seen.m, seen.row, seen.col, *factors(seen, x.ndim)))
    v = seen.v[0]
    inverse, factor = (v + 1e-8).rsqrt(), [a * b for a, b in zip(f, c, strict=True)]
    full = [g, g.clamp(-0.1, 0.1), x, *m, v, *(t * inverse for t in m), inverse, *(g * t for t in factor), g * inverse]
    full += [t * h for t, h in zip(m, factor, strict=True)]
    compact = [*row, *col, *((t + 1e-8).rsqrt() for t in (*row, *col))]
    first = _folded(w["w0"][list(FULL)], full, x.shape[:-2], eps)
    shares = _folded(w["w0"][15:27], compact, x.shape[:-2], eps)
    hidden = []
    for weights, share, bias in zip(first, shares, w["b0"], strict=True):
        rows, columns = (_sum([compact[i] for i in at], [share[i] for i in at]) for at in (ROWS, COLUMNS))
        hidden.append((_sum(full, weights) + (rows + bias + columns)).relu())
    again = [(_sum(hidden, weights) + bias).relu() for weights, bias in zip(w["w1"].T, w["b1"], strict=True)]
    return _sum(again, w["w2"][:, 0]) + w["b2"][0]


def _folded(w0: Tensor, features: Sequence[Tensor], kernel: Sequence[int], eps: float) -> Tensor:
    """The first layer's weights (units, features, *kernel, 1, 1), with what features are divided by."""
    means = [t.square().mean((-2, -1), keepdim=True).expand(*kernel, 1, 1) for t in features]
    scale = (torch.stack(means) + eps).rsqrt()
    return w0.T.reshape(*w0.T.shape, *[1] * (scale.ndim - 1)) * scale


def _sum(inputs: Sequence[Tensor], weights: Any) -> Tensor:
    found: Tensor = inputs[0] * weights[0]
    for x, w in zip(inputs[1:], weights[1:], strict=True):
        found = found + x * w
    return found
