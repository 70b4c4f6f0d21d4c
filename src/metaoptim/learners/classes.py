"""Classes as numbers: which example is of which class, class means, and features to compare them by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaoptim.core.types import Batch, Params
from metaoptim.learners.network import Network, one_tensor


def embedded(network: Network, weights: Params, x: Tensor, support: Batch | None, ways: int | None = None) -> Tensor:
    """Features (B, D): what the head reads; or, where `ways` says how many classes there are, the network's output itself."""
    read = network.output if ways else network.features
    return one_tensor(read(weights, x, support), "the network")


def members(y: Any, ways: int) -> Tensor:
    """Which of M examples is of which of N classes: bool (M, N). A ValueError for targets that are no class numbers."""
    if not isinstance(y, Tensor) or y.is_floating_point():
        found = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"this method reads classes: targets must be class numbers, such as int64; found {found}.")
    return y[:, None] == torch.arange(ways, device=y.device)


def class_means(z: Tensor, member: Tensor) -> Tensor:
    """The mean (N, D) of each class of features z (M, D); 0 for a class without an example."""
    return member.to(z.dtype).mT @ z / member.sum(0).clamp(min=1)[:, None]
