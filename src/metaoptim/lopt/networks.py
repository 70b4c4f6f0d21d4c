"""Small networks as functions of their weights, and starts for them, drawn as torch draws its own layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.types import Params
from metaoptim.nn.attention import scaled_dot_product_attention
from metaoptim.nn.norms import centred
from metaoptim.tasks.base import uniforms

Shapes = dict[str, tuple[int, ...]]
Network = tuple[Shapes, Callable[[Params, Tensor], Tensor]]
"""The shapes of the weights, by name, and the logits (B, …, N) as a function of weights and inputs (B, …)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


def start(shapes: Shapes, seed: int) -> Params:
    """Weights and biases uniform within ±1/√fan_in, as in `nn.Linear` and `nn.Conv2d`; norms begin as the identity."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    chances = torch.from_numpy(uniforms(seed, "start", 0, 1, sum(sizes))[0])
    drawn = {}
    for (name, shape), chance in zip(shapes.items(), torch.split(chances, sizes), strict=True):
        layer = shapes[name.rpartition(".")[0] + ".weight"]
        norm = len(layer) == 1
        value = torch.full_like(chance, name.endswith("weight")) if norm else (2 * chance - 1) / math.sqrt(math.prod(layer[1:]))
        drawn[name] = value.reshape(shape).to(torch.get_default_dtype())
    return drawn


def mlp(sizes: Sequence[int], activation: str) -> Network:
    """Linear layers `0`, `1`, … of these widths, from input to output."""
    last = len(sizes) - 2

    def output(weights: Params, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i in range(last):
            x = ACTIVATIONS[activation](_linear(weights, f"{i}", x))
        return _linear(weights, f"{last}", x)

    return _joined(*(_layer(f"{i}", b, a) for i, (a, b) in enumerate(pairwise(sizes)))), output


def convnet(channels: Sequence[int], classes: int) -> Network:
    """3×3 convolutions with stride 2 and ReLU, from one channel to these; the mean over positions, and a linear head."""

    def output(weights: Params, x: Tensor) -> Tensor:
        for i in range(len(channels)):
            x = F.relu(F.conv2d(x, weights[f"{i}.weight"], weights[f"{i}.bias"], stride=2, padding=1))
        return _linear(weights, "head", x.mean((-2, -1)))

    convolutions = (_layer(f"{i}", b, a, 3, 3) for i, (a, b) in enumerate(pairwise([1, *channels])))
    return _joined(*convolutions, _layer("head", classes, channels[-1])), output


def transformer(width: int, depth: int, heads: int, context: int, symbols: int) -> Network:
    """A causal transformer that normalises first in each block (Xiong et al. 2020), with GELU; codes (B, L) -> (B, L, N).

    Symbols and positions are embedded by linear layers of one-hot vectors, and so begin.
    """

    def output(weights: Params, x: Tensor) -> Tensor:
        kinds = torch.arange(symbols, device=x.device)
        token, position = weights["token.weight"], weights["position.weight"]
        x = (x.unsqueeze(-1) == kinds).to(token.dtype) @ token.T + position.T
        for i in range(depth):
            qkv = _linear(weights, f"{i}.qkv", _norm(weights, f"{i}.norm1", x))
            query, key, value = (h.reshape(*h.shape[:-1], heads, -1).transpose(-3, -2) for h in qkv.chunk(3, -1))
            seen = scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + _linear(weights, f"{i}.out", seen.transpose(-3, -2).flatten(-2))
            hidden = F.gelu(_linear(weights, f"{i}.up", _norm(weights, f"{i}.norm2", x)))
            x = x + _linear(weights, f"{i}.down", hidden)
        return _linear(weights, "head", _norm(weights, "norm", x))

    blocks = (
        _joined(
            _layer(f"{i}.norm1", width),
            _layer(f"{i}.qkv", 3 * width, width),
            _layer(f"{i}.out", width, width),
            _layer(f"{i}.norm2", width),
            _layer(f"{i}.up", 4 * width, width),
            _layer(f"{i}.down", width, 4 * width),
        )
        for i in range(depth)
    )
    embeddings: Shapes = {"token.weight": (width, symbols), "position.weight": (width, context)}
    return _joined(embeddings, *blocks, _layer("norm", width), _layer("head", symbols, width)), output


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _joined(*layers: Shapes) -> Shapes:
    return {name: shape for layer in layers for name, shape in layer.items()}


def _linear(weights: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Params, name: str, x: Tensor) -> Tensor:
    gap, _, var = centred(x, (-1,))
    return gap * (var + 1e-5).rsqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
