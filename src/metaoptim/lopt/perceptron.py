"""The small networks that learned rules are made of, and what they start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaoptim.core.types import Params


def drawn(shape: Sequence[int], fan_in: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """A normal distribution of spread 1/√fan_in, cut off at two spreads; in the floats of `like`, 32 bits at least."""
    kind, spread = torch.promote_types(like.dtype, torch.float32), 1 / math.sqrt(fan_in)
    x = torch.empty(tuple(shape), dtype=kind, device=generator.device)  # so that every device starts from the same numbers
    nn.init.trunc_normal_(x, std=spread, a=-2 * spread, b=2 * spread, generator=generator)
    return x.to(like.device)


def start_of_perceptron(sizes: Sequence[int], like: Tensor, generator: torch.Generator) -> Params:
    """Weights w0, w1, … (in, out) and biases b0, b1, …, which are zero."""
    psi: Params = {}
    for i, (before, after) in enumerate(pairwise(sizes)):
        psi[f"w{i}"] = drawn((before, after), before, like, generator)
        psi[f"b{i}"] = torch.zeros_like(psi[f"w{i}"][0])
    return psi


def perceptron(psi: Params, x: Tensor, first: int = 0) -> Tensor:
    """(…, in, N) -> (…, out, N) for N weights, with ReLUs in between; first: the layer that x goes into."""
    depth = sum(name.startswith("w") for name in psi)
    for i in range(first, depth):
        x = psi[f"w{i}"].to(x.dtype).mT @ x + psi[f"b{i}"].to(x.dtype).unsqueeze(-1)
        x = x.relu() if i < depth - 1 else x
    return x
