"""The LSTM that learns to learn, coordinate by coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_flags, check_positive
from metaoptim.core.gradients import hold
from metaoptim.core.types import Params, State, Step
from metaoptim.lopt.checks import first
from metaoptim.lopt.features import raised
from metaoptim.lopt.perceptron import drawn
from metaoptim.nn.recurrent import RECURRENT

LARGEST_P = 80  # e^p must be a float32


@dataclass(frozen=True)
class LSTM:
    """u = scale · (w · h + b), (h, state) = an LSTM of the gradient g of one weight and the state of that weight.

    The same LSTM for every weight, whose inputs are (log|g| / p, sgn g) where |g| ≥ e^−p, else (−1, e^p g). ψ: weight_ih_lI,
    weight_hh_lI and bias_lI of layer I, gates in torch's order, and out.weight and out.bias; 5,141 numbers. They start from
    truncated normals of spread 1/√inputs, and zeros but for a forget gate's bias of 1.

    Source: Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474, section 2.1 and appendix A. The released code has
    p=5 and scale=0.01, and for quadratics p=None and scale=1.

    Args:
        p: at what size of a gradient, e^−p, its logarithm gives way to itself; none: the input is g alone.
        scale: what the output is multiplied by.
        hidden, layers: units of a layer, and layers.
        first_order: whether g is a constant of the meta-gradient, as in the paper; the derivatives of g are left out even by
            an estimator that takes them.
    """

    p: float | None = 10.0
    scale: float = 0.1
    hidden: int = 20
    layers: int = 2
    first_order: bool = True
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(p=self.p, scale=self.scale)
        check_counts(hidden=self.hidden, layers=self.layers)
        check_flags(first_order=self.first_order)
        if self.p is not None and self.p > LARGEST_P:
            raise ValueError(f"p={self.p}: it must be at most {LARGEST_P}, or float32 can't hold e^p.")

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        like, psi, size = first(weights), Params(), 1 if self.p is None else 2
        for i in range(self.layers):
            joint = drawn((4 * self.hidden, size + self.hidden), size + self.hidden, like, generator)
            psi |= {f"weight_ih_l{i}": joint[:, :size].contiguous(), f"weight_hh_l{i}": joint[:, size:].contiguous()}
            gates = joint.new_tensor((0.0, 1.0, 0.0, 0.0))  # input, forget, cell, output
            psi[f"bias_l{i}"], size = gates.repeat_interleave(self.hidden), self.hidden
        out = drawn((1, self.hidden), self.hidden, like, generator)
        return psi | {"out.weight": out, "out.bias": out.new_zeros(1)}

    def init(self, psi: Params, weights: Params) -> State:
        """(h, c) for every layer, (all weights, hidden), in the order of their names."""
        rows = _joined(raised(weights)).unsqueeze(-1).expand(-1, self.hidden)
        return tuple((torch.zeros_like(rows), torch.zeros_like(rows)) for _ in range(self.layers))

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        g = _joined(raised(grads))
        psi = {n: x.to(g.dtype) for n, x in psi.items()}
        x, new = self.inputs(hold(g) if self.first_order else g), []
        for i, (h, c) in enumerate(state):
            matrices = (psi[f"{part}_l{i}"] for part in ("weight_ih", "weight_hh", "bias"))
            x, c = RECURRENT[torch.lstm_cell](x, (h, c), *matrices)
            new.append((x, c))
        u = self.scale * F.linear(x, psi["out.weight"], psi["out.bias"]).squeeze(-1)
        names = sorted(grads)
        parts = torch.split(u, [grads[n].numel() for n in names])
        return {n: part.view_as(weights[n]).to(weights[n].dtype) for n, part in zip(names, parts, strict=True)}, tuple(new)

    def inputs(self, g: Tensor) -> Tensor:
        """(N) -> (N, 2), or (N, 1) without p."""
        if self.p is None:
            return g.unsqueeze(-1)
        size = g.abs().clamp(min=math.exp(-self.p)).log() / self.p
        return torch.stack([size, (g * math.exp(self.p)).clamp(-1, 1)], -1)


def _joined(tensors: Params) -> Tensor:
    return torch.cat([tensors[n].reshape(-1) for n in sorted(tensors)])
