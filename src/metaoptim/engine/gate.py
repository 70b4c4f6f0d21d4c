"""Whether a meta-gradient is the plain loop's, up to rounding.

Rounding is more than the last digit: where a ReLU's input is 0 but for rounding, two ways that are right take different sides
of it, and in float32 a whole meta-gradient can differ by a percent. It is rare, and elsewhere on the next φ. So a way that
differs by more than is usual is compared again where φ is rounded otherwise: one that is wrong is wrong there too. It is also
given what the plain loop itself moves by from one such φ to another.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Estimate, MetaOptimizer, MetaParams

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}  # how far a way may be from the plain loop, relative to its norm
ROUGH = 0.1  # the same for half precision, on purpose or in the weights
AMPLIFIED = 50  # times as far for estimators that divide by small numbers: solvers, differences, evolution strategies
ROUNDED = 8  # units in the last place by which weights are moved, either way
TRIALS = 3


def gap(
    method: MetaOptimizer,
    half: bool,
    phi: MetaParams,
    found: Estimate,
    expected: Estimate,
    again: Callable[[MetaParams], Estimate],
    plainly: Callable[[MetaParams], Estimate],
) -> float:
    """How far `found` is from what the plain loop gave, `expected`, relative to its norm; 0 where that is rounding.

    half: whether half precision was asked for; again, plainly: that way and the plain loop at another φ, with the same random
    numbers.
    """
    dtype = trees.flatten(phi)[0].dtype
    usual = ROUGH if half else CLOSE.get(dtype, ROUGH)
    divides = method.estimator.claim in ("implicit", "stochastic") or getattr(method.estimator, "divides", False)
    usual *= AMPLIFIED if divides else 1
    apart = _distance(found, expected)
    if apart <= usual:
        return 0.0
    for trial in range(TRIALS):
        near = _rounded(phi, trial)
        there = plainly(near)
        if apart <= _distance(there, expected) or _distance(again(near), there) <= usual:
            return 0.0
    return apart


def _distance(found: Estimate, expected: Estimate) -> float:
    pairs = zip(trees.flatten(found.grad), trees.flatten(expected.grad), strict=True)
    squares = [(torch.linalg.vector_norm(a - b) ** 2, torch.linalg.vector_norm(b) ** 2) for a, b in pairs]
    off, size = (torch.stack(parts).sum().sqrt().item() for parts in zip(*squares, strict=True))
    return 0.0 if not isfinite(size) else off / size if size else off


def _rounded(phi: MetaParams, trial: int) -> MetaParams:
    """φ, moved by a few units in the last place of every number, at random."""
    draw = torch.Generator().manual_seed(trial)

    def moved(x: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            return x
        sign = 2.0 * torch.randint(2, x.shape, generator=draw, device=draw.device).to(x.device) - 1
        return (x.detach() * (1 + ROUNDED * torch.finfo(x.dtype).eps * sign)).to(x.dtype)

    there: MetaParams = trees.map_tensors(moved, phi)
    return there
