"""Weights in the order of axes for which learned rules were published.

JAX keeps a linear weight as (in, out) and the weight of a convolution as (kernel …, in, out), which is called HWIO; torch
keeps them as (out, in) and (out, in, kernel …). What a rule computes over "the last two axes", or over the largest, depends
on it: over torch's last two axes each kernel would be treated alone.
"""

from __future__ import annotations

from torch import Tensor


def to_hwio(x: Tensor, dim: int) -> Tensor:
    """(…, out, in, *kernel) as (…, *kernel, in, out); a scalar as a vector of one element.

    dim: the weight's own axes; what stands before them is a batch of weights.
    """
    if dim == 0:
        return x.unsqueeze(-1)
    return x if dim == 1 else x.movedim((-dim, 1 - dim), (-1, -2))


def from_hwio(x: Tensor, dim: int) -> Tensor:
    """The way back; dim: the axes that the weight has in torch."""
    if dim == 0:
        return x.squeeze(-1)
    return x if dim == 1 else x.movedim((-1, -2), (-dim, 1 - dim))
