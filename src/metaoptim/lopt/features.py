"""What learned rules see of a weight: moments of its gradients, over several horizons, and their ratios.

Everything here is for tensors (D, …, *shape): D decays or features, batches of weights, and a weight's own axes in HWIO order
(see `layout`), `dim` of them and at least one. D comes first, so that a feature lies in memory as one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaoptim.core.types import Params

HORIZONS = (0.9, 0.99, 0.999)


class Moments(NamedTuple):
    """Running means of a weight's gradients g: m of g, v of g², row and col of g² averaged over one axis, which keeps size 1.

    row: over the largest axis; col: over the second largest (Shazeer and Stern 2018, Adafactor); a vector's are of g² itself.
    """

    m: Tensor
    v: Tensor
    row: Tensor
    col: Tensor


class Decays(NamedTuple):
    """Of `m` (3), of `v` (1), and of `row` and `col` together (3)."""

    m: Tensor
    v: Tensor
    factored: Tensor


def raised(params: Params) -> Params:
    """The same tensors in float32 at least: means of small numbers are lost in floats of 16 bits."""
    return {n: x.to(torch.promote_types(x.dtype, torch.float32)) for n, x in params.items()}


def largest(x: Tensor, dim: int) -> tuple[int, int]:
    """The largest axis of a weight and the second largest, from the end; of equal ones the later counts as larger."""
    *_, second, first = sorted(range(-dim, 0), key=lambda axis: x.shape[axis])
    return first, second


def over_axes(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Means over the largest axis and over the second largest, which keep size 1; a vector itself, twice."""
    if dim < 2:
        return x, x
    first, second = largest(x, dim)
    return x.mean(first, keepdim=True), x.mean(second, keepdim=True)


def start_of_moments(x: Tensor, dim: int) -> Moments:
    """Zeros, for a weight x (…, *shape)."""
    m = torch.stack([torch.zeros_like(x)] * len(HORIZONS))
    row, col = (torch.zeros_like(mean) for mean in over_axes(m, dim))
    return Moments(m, torch.zeros_like(x).unsqueeze(0), row, col)


def after(old: Moments, g: Tensor, decays: Decays, dim: int) -> Moments:
    """The moments after a gradient g (1, …, *shape)."""
    square = g.square()
    of_m, of_v, d = (x.reshape(-1, *[1] * (g.ndim - 1)) for x in decays)
    over_first, over_second = over_axes(square + 1e-30, dim)
    return Moments(g.lerp(old.m, of_m), square.lerp(old.v, of_v), over_first.lerp(old.row, d), over_second.lerp(old.col, d))


def factor(moments: Moments, dim: int) -> Tensor:
    """What Adafactor multiplies a gradient by: 1/√v for v ≈ row · col / mean(row); of a vector v itself."""
    if dim < 2:
        return (moments.row + 1e-9).rsqrt()
    mean = moments.row.mean(largest(moments.m, dim)[1], keepdim=True)
    return (moments.row / (mean + 1e-9)).clamp(min=1e-9).rsqrt() * moments.col.clamp(min=1e-9).rsqrt()


def together(features: Sequence[Tensor], g: Tensor) -> Tensor:
    """One tensor (all D, …, *shape) of features, of which some have size 1 where g (1, …, *shape) has more."""
    return torch.cat([x.expand(-1, *g.shape[1:]) for x in features])


def normalised(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """x / √(mean x² + eps), with the mean over some axes."""
    return x * (x.square().mean(tuple(axes), keepdim=True) + eps).rsqrt()
