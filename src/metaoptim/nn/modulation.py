"""Layers with weights that have a part of their own in the inner loop: a context alone adapts, a transform alone does not.

An algorithm knows these weights by their names, `context` and `transform`, in any module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ContextInput(nn.Module):
    """(B, D) -> (B, D + size): a context vector beside every input."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.context = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.expand(x.shape[0], -1)], 1)

    def extra_repr(self) -> str:
        return f"{self.context.numel()}"


class FiLM(nn.Module):
    """γ · x + β per channel of (B, C, …), with (γ, β) linear in a context vector (Perez 2018); at the start γ = 1, β = 0.

    The weights that read the context are not zero: the context, which is, would have no gradient.
    """

    def __init__(self, channels: int, size: int) -> None:
        nn.Module.__init__(self)
        if channels < 1 or size < 1:
            raise ValueError(f"FiLM: channels={channels}, size={size}: both must be at least 1.")
        self.context = nn.Parameter(torch.zeros(size))
        self.weight = nn.Parameter(torch.empty(2 * channels, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale, shift = (self.weight @ self.context + self.bias).chunk(2)
        return scale.view(shape) * x + shift.view(shape)

    def extra_repr(self) -> str:
        return f"{self.bias.numel() // 2}, {self.context.numel()}"


class Transform(nn.Module):
    """T x over the channels of (B, C, …), with a matrix T (C, C) that starts as the identity: a 1×1 convolution."""

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.transform = nn.Parameter(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (self.transform @ x.flatten(2)).reshape(x.shape) if x.ndim > 2 else x @ self.transform.mT

    def extra_repr(self) -> str:
        return f"{self.transform.shape[0]}"
