"""small_fc_lopt: a perceptron of 39 features for every single weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.types import Params, State, Step
from metaoptim.lopt.checks import first
from metaoptim.lopt.features import HORIZONS, Decays, Moments, after, factor, raised, start_of_moments
from metaoptim.lopt.layout import from_hwio, to_hwio
from metaoptim.lopt.perceptron import perceptron, start_of_perceptron

TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
LARGEST = 1e8  # float32 holds the square of a mean of squares up to there


@dataclass(frozen=True)
class SmallFC:
    """u = −0.001 · d · exp(0.001 · a), (d, a) = a perceptron 39 → 4 → 4 → 2 of the features of a weight x with gradient g.

    28 features, each divided by its root mean square over the tensor: g, x; m (decays .9, .99, .999); v (.999); m/√v, 1/√v;
    g·f; row, col, 1/√row, 1/√col (.9, .99, .999); m·f, with Adafactor's factor f (see `features`). 11 more: tanh(k/τ − 1) for
    the number k of the step, τ = 1, 3, 10 … 100,000. ψ: w0, b0, w1, b1, w2, b2 (190 numbers) and 7 numbers y in decay.m,
    decay.v and decay.factored, of which a decay is 1 − (1 − d)·exp(10·y), with d as above.

    Source: `AdafacMLPLOpt` of learned_optimization (Metz, Freeman, Harrison, Maheswaranathan and Sohl-Dickstein 2022,
    https://arxiv.org/abs/2203.11860). Gradients beyond ±1e8 count as ±1e8, which there end in NaN.
    """

    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        psi = start_of_perceptron((39, 4, 4, 2), first(weights), generator)
        return psi | {f"decay.{n}": psi["b0"].new_zeros(d) for n, d in (("m", 3), ("v", 1), ("factored", 3))}

    def init(self, psi: Params, weights: Params) -> State:
        return {n: start_of_moments(to_hwio(x, x.ndim), max(x.ndim, 1)) for n, x in raised(weights).items()}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        updates, new = {}, {}
        seen_in = raised(grads)
        like = next(iter(seen_in.values()))
        own, network = decays(psi, like), network_at(psi, step.k, like)
        for n, g in seen_in.items():
            dim = g.ndim
            # In one order in memory: operators on tensors of two orders take several times as long.
            x, g = (to_hwio(t.to(g.dtype), dim).contiguous().unsqueeze(0) for t in (weights[n], g.clamp(-LARGEST, LARGEST)))
            new[n] = after(state[n], g, own, max(dim, 1))
            u = moves(network, x, g, new[n], max(dim, 1))
            updates[n] = from_hwio(u, dim).to(weights[n].dtype)
        return updates, new


def decays(psi: Params, like: Tensor) -> Decays:
    """The decays that ψ stands for."""

    def decay(name: str, *start: float) -> Tensor:
        left = 1 - torch.tensor(start, dtype=like.dtype, device=like.device)
        return (1 - left * (10 * psi[f"decay.{name}"].to(like.dtype)).exp()).clamp(0, 1)

    return Decays(decay("m", *HORIZONS), decay("v", 0.999), decay("factored", *HORIZONS))


def network_at(psi: Params, k: Tensor, like: Tensor) -> Params:
    """The perceptron of 28 features at step k: what it sees of time is the same for all weights, and stands in its bias."""
    times = (k / torch.tensor(TIMES, dtype=like.dtype, device=like.device) - 1).tanh()
    of_weights, of_time = torch.tensor_split(psi["w0"].to(like.dtype), (28,))
    network = {n: p for n, p in psi.items() if not n.startswith("decay.")}
    return network | {"w0": of_weights, "b0": psi["b0"].to(like.dtype) + times @ of_time}


def moves(network: Params, x: Tensor, g: Tensor, seen: Moments, dim: int) -> Tensor:
    """Updates (…, *shape) of weights x with gradients g (1, …, *shape), of which there may be batches."""
    m, v, row, col = seen
    inverse = (v + 1e-6).rsqrt()
    of_m = (row + 1e-6).rsqrt() if dim < 2 else factor(seen, dim)
    features = [g, x, m, v, m * inverse, inverse, g * factor(seen, dim), row, col]
    features += [(row + 1e-8).rsqrt(), (col + 1e-8).rsqrt(), m * of_m]
    hidden = first_layer(network, features, dim, 1e-5).relu()
    direction, magnitude = perceptron(network, hidden.flatten(1), 1).view(2, *g.shape[1:])
    u: Tensor = -0.001 * direction * (0.001 * magnitude).exp()
    return u


def first_layer(network: Params, features: Sequence[Tensor], dim: int, eps: float) -> Tensor:
    """The first layer (units, …, *shape) of features (D, …, *shape), each divided by its root mean square over `shape`.

    That division goes into the layer's weights. Features that are constant along an axis, where they have size 1, keep it.
    """
    axes = tuple(range(-dim, 0))
    found, parts = network["b0"].view(-1, *[1] * (features[0].ndim - 1)), torch.split(network["w0"], [len(f) for f in features])
    for shape in sorted({f.shape[1:] for f in features}, key=math.prod):
        own = torch.cat([f for f in features if f.shape[1:] == shape])
        weights = torch.cat([w for w, f in zip(parts, features, strict=True) if f.shape[1:] == shape])
        scale = (own.square().mean(axes, keepdim=True) + eps).rsqrt()
        folded = weights.mT * scale.flatten(-dim).movedim(0, -1)
        shares = folded @ own.flatten(-dim).movedim(0, -2)
        found = found + shares.movedim(-2, 0).reshape(-1, *shape)
    return found
