"""Families of training problems: what an update rule is meta-trained on, and what it is judged on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaoptim.core.checks import check_counts
from metaoptim.core.losses import cross_entropy
from metaoptim.core.types import Batch, Info, Params
from metaoptim.lopt import networks
from metaoptim.lopt.data import Data, Name, load
from metaoptim.lopt.problem import Problems
from metaoptim.lopt.text import text
from metaoptim.tasks.base import uniforms


def quadratics(dim: int = 10, uniform: bool = False, steps: int = 100) -> Problems:
    """‖Wθ − y‖² with W [dim, dim] and y [dim] of each problem its own, the same at every step; no minibatches.

    Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474, section 3.1: all entries standard normal, θ_0 normal with
    deviation 0.01, as in its code. Knowing nothing, θ = 0, costs E‖y‖².

    Args:
        dim: size of θ.
        uniform: entries of W and y uniform in [0, 1), as in the published code, in place of normal ones.
        steps: inner steps K of a run.
    """
    check_counts(dim=dim, steps=steps)

    def start(seed: int) -> Params:
        return {"theta": 0.01 * _normal(seed, "start", dim)}

    def batches(seed: int, stream: str, first: int, count: int) -> Batch:
        entries = (_uniform if uniform else _normal)(seed, "quadratic", dim * dim + dim)
        return entries[:-dim].reshape(1, dim, dim), entries[-dim:].reshape(1, dim)

    def loss(weights: Params, batch: Batch) -> tuple[Tensor, Info]:
        matrix, target = batch
        return (matrix @ weights["theta"] - target).square().sum(), {}

    unit = dim / 3 if uniform else float(dim)
    name = f"quadratics-{dim}" + ("-uniform" if uniform else "")
    return Problems(name, start, batches, loss, unit, steps, options={"dim": dim, "uniform": uniform})


def _uniform(seed: int, stream: str, count: int) -> Tensor:
    return torch.from_numpy(uniforms(seed, stream, 0, 1, count)[0]).to(torch.get_default_dtype())


def _normal(seed: int, stream: str, count: int) -> Tensor:
    u = uniforms(seed, stream, 0, count, 2)
    drawn = np.sqrt(-2 * np.log(1 - u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
    return torch.from_numpy(drawn).to(torch.get_default_dtype())


def logistic(data: Data, batch: int = 64, steps: int = 100) -> Problems:
    """Multinomial logistic regression of data: a linear layer, a convex loss.

    Args:
        data: labelled examples.
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
    """
    return _classifiers("logistic", data, networks.mlp([data.x[0].numel(), data.classes], "relu"), batch, steps)


def mlp(data: Data, hidden: Sequence[int] = (32,), activation: str = "relu", batch: int = 64, steps: int = 100) -> Problems:
    """Classification by a multi-layer perceptron.

    Args:
        data: labelled examples.
        hidden: widths of the layers between input and output.
        activation: "relu", "tanh", "gelu" or "sigmoid".
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
    """
    for width in hidden:
        check_counts(hidden=width)
    if activation not in networks.ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: it must be one of {', '.join(networks.ACTIVATIONS)}.")
    built = networks.mlp([data.x[0].numel(), *hidden, data.classes], activation)
    name = f"mlp-{'x'.join(map(str, hidden))}-{activation}"
    return _classifiers(name, data, built, batch, steps, hidden=list(hidden), activation=activation)


def mlps(data: Data, count: int, seed: int = 0, batch: int = 64, steps: int = 100) -> tuple[Problems, ...]:
    """Several families of perceptrons of random shape: 1 to 3 hidden layers of one width, 8 to 64, and any activation.

    Args:
        data: labelled examples.
        count: families.
        seed: of the shapes.
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
    """
    check_counts(count=count)
    kinds = list(networks.ACTIVATIONS)
    return tuple(
        mlp(data, [round(8 ** (1 + w))] * (1 + int(3 * d)), kinds[int(len(kinds) * a)], batch, steps)
        for w, d, a in uniforms(seed, "mlps", 0, count, 3).tolist()
    )


def convnet(data: Data, channels: Sequence[int] = (16, 32), batch: int = 64, steps: int = 100) -> Problems:
    """Classification by 3×3 convolutions with stride 2, ReLU between them, the mean over positions, a linear head.

    Args:
        data: labelled examples.
        channels: of the convolutions, one after the other.
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
    """
    for width in channels:
        check_counts(channels=width)
    built = networks.convnet(channels, data.classes)
    return _classifiers(f"convnet-{'x'.join(map(str, channels))}", data, built, batch, steps, channels=list(channels))


def transformer(
    width: int = 32, depth: int = 2, heads: int = 2, context: int = 32, batch: int = 64, steps: int = 100
) -> Problems:
    """A causal transformer that predicts the next character of a generated text (see `text`) at every place.

    Args:
        width: of the residual stream.
        depth: layers.
        heads: of attention, which must divide the width.
        context: places.
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
    """
    check_counts(width=width, depth=depth, heads=heads)
    if width % heads:
        raise ValueError(f"width={width}, heads={heads}: the width must be a multiple of the heads.")
    data = text(context)
    built = networks.transformer(width, depth, heads, context, data.classes)
    return _classifiers(
        f"transformer-{width}x{depth}x{heads}", data, built, batch, steps, width=width, depth=depth, heads=heads
    )


def _classifiers(kind: str, data: Data, network: networks.Network, batch: int, steps: int, **options: Any) -> Problems:
    check_counts(batch=batch, steps=steps)
    shapes, output = network

    def loss(weights: Params, minibatch: Batch) -> tuple[Tensor, Info]:
        x, y = minibatch
        return cross_entropy(output(weights, x), y), {}

    return Problems(
        f"{kind}-{data.name}",
        partial(networks.start, shapes),
        partial(data.batches, batch),
        loss,
        math.log(data.classes),
        steps,
        options={"data": data.name, "examples": len(data.x), "batch": batch, **options},
    )


Row = tuple[Callable[..., Problems], tuple[Name, int] | None, dict[str, Any]]
"""A family's builder, its data and their size (None: it has none), and its options."""

TRAINING: tuple[Row, ...] = (
    (mlp, ("digits", 8), {}),
    (mlp, ("digits", 8), {"hidden": (24, 24), "activation": "tanh"}),
    (mlp, ("glyphs", 8), {}),
    (mlp, ("glyphs", 8), {"hidden": (48, 16), "activation": "gelu"}),
)

HELD_OUT: dict[str, Row] = {
    "MNIST": (mlp, ("mnist", 8), {}),
    "CIFAR": (mlp, ("cifar", 16), {}),
    "convolutions": (convnet, ("digits", 8), {}),
    "transformer": (transformer, None, {}),
    "5 times the steps": (mlp, ("digits", 8), {"steps": 500}),
    "10 times the width": (mlp, ("digits", 8), {"hidden": (320,)}),
}
"""Each differs from the first family of `TRAINING` in what its name says."""


def training_families(root: str | None = None) -> tuple[Problems, ...]:
    """What the rules that come with the library are meta-trained on: perceptrons on digits and letters of 8×8 pixels.

    Args:
        root: the folder that holds data (see `load`), for what needs any.
    """
    return tuple(_built(row, root) for row in TRAINING)


def held_out(root: str | None = None) -> dict[str, Problems]:
    """What they are judged on, by the name of what is new: data, architecture, length or width. Data: see `load`."""
    return {name: _built(row, root) for name, row in HELD_OUT.items()}


def _built(row: Row, root: str | None) -> Problems:
    build, data, options = row
    return build(**options) if data is None else build(load(*data, root=root), **options)


FAMILIES: dict[str, Callable[..., Problems | tuple[Problems, ...]]] = {
    "quadratics": quadratics,
    "logistic": logistic,
    "mlp": mlp,
    "mlps": mlps,
    "convnet": convnet,
    "transformer": transformer,
    "training_families": training_families,
}
"""What recipes know by name."""
