"""Gradient operators: in which way the gradient of a scalar function is taken, as far as later differentiation goes.

`torch.func.grad` itself is the exact one, for a gradient that will be differentiated again. `hold` is for a value in a rule
that is to be a constant of the meta-gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metaoptim.core.types import Params


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


_HOLDER: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("_HOLDER", default=None)


def hold(x: Tensor) -> Tensor:
    """x as a constant of the meta-gradient, on purpose: a check holds it too, while it takes a `detach` for a fault."""
    holder, x = _HOLDER.get(), x.detach()
    return x if holder is None else holder(x)


@contextmanager
def holding(holder: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `hold` returns what the holder makes of a value."""
    token = _HOLDER.set(holder)
    try:
        yield
    finally:
        _HOLDER.reset(token)


@contextmanager
def recorded(tape: list[Tensor]) -> Iterator[None]:
    """Inside, the values that are held are put on a tape."""

    def record(x: Tensor) -> Tensor:
        tape.append(x)
        return x

    with holding(record):
        yield


@contextmanager
def replayed(tape: list[Tensor]) -> Iterator[None]:
    """Inside, the values that are held are those of a tape, in their order, whatever they would be."""
    left = iter(tape)
    with holding(lambda x: next(left)):
        yield
