"""A square root that can be differentiated at 0."""

from __future__ import annotations

import torch
from torch import Tensor


def root(x: Tensor) -> Tensor:
    """√x for x >= 0, whose slope at 0 is taken for 0: it is infinite there, where every weight without a gradient is.

    For a mean of squares that is right: √(Σ c_i g_i²) has a kink where all g_i are 0, and 0 is one of its subgradients.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
