"""Gradient operators: in which way the gradient of a scalar function is taken, as far as later differentiation goes.

`torch.func.grad` itself is the exact one, for a gradient that will be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metaoptim.types import Params


def outermost(f: Callable[[Params], Tensor]) -> Callable[[Params], Params]:
    """The gradient of f where nothing differentiates it again: no graph of the backward pass is built."""
    return lambda x: outermost_and_value(lambda x: (f(x), ()))(x)[0]


def outermost_and_value(f: Callable[[Any], tuple[Tensor, Any]]) -> Callable[[Any], tuple[Any, tuple[Tensor, Any]]]:
    """The same of a function with further results: x -> (∇f(x), (f(x), what else it returned))."""

    def gradient(x: Any) -> tuple[Any, tuple[Tensor, Any]]:
        differentiated: Any = vjp(f, x, has_aux=True)
        value, pull, others = differentiated
        return pull(torch.ones_like(value), retain_graph=False, create_graph=False)[0], (value, others)

    return gradient


def constant(f: Callable[[Params], Tensor]) -> Callable[[Params], Params]:
    """The gradient of f as a constant of every outer differentiation, for which no graph is recorded."""

    def gradient(x: Params) -> Params:
        with torch.no_grad():
            return {n: g.detach() for n, g in outermost(f)(x).items()}

    return gradient
