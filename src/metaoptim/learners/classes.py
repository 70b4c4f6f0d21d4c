"""Classes as numbers: which example is of which class, class means, and features to compare them by."""

from __future__ import annotations

import torch
from torch import Tensor

from metaoptim.core.types import Batch, Params
from metaoptim.learners.network import Network


def embedded(network: Network, weights: Params, x: Tensor, support: Batch | None, ways: int | None = None) -> Tensor:
    """Features (B, D): what the head reads; or, where `ways` says how many classes there are, the network's output itself."""
    read = network.output if ways else network.features
    found: Tensor = read(weights, x, support)
    return found


def members(y: Tensor, ways: int) -> Tensor:
    """Which of M examples is of which of N classes: bool (M, N). A ValueError for targets that are no class numbers."""
    if y.is_floating_point():
        raise ValueError(f"this method reads classes: targets must be class numbers, such as int64; found {y.dtype}.")
    return y[:, None] == torch.arange(ways, device=y.device)


def class_means(z: Tensor, member: Tensor) -> Tensor:
    """The mean (N, D) of each class of features z (M, D); 0 for a class without an example."""
    return member.to(z.dtype).mT @ z / member.sum(0).clamp(min=1)[:, None]
