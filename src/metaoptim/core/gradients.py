"""In which way a gradient is taken, as far as later differentiation goes.

`exact` and `held` are for the inner loop; `outermost` for a gradient that nothing differentiates again. `hold` is for a value
in a rule that is to be a constant of the meta-gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from metaoptim.core.types import Loss, Params


def exact(f: Loss, x: Params) -> tuple[Params, Tensor]:
    """(∇f(x), f(x)), to be differentiated again."""
    grads, (loss, _) = grad_and_value(f, has_aux=True)(x)
    return grads, loss


def held(f: Loss, x: Params) -> tuple[Params, Tensor]:
    """(∇f(x), f(x)) as constants of every outer differentiation, for which no graph is recorded."""
    with torch.no_grad():
        grads, (loss, _) = outermost(f, x)
        return {n: g.detach() for n, g in grads.items()}, loss.detach()


def outermost(f: Callable[[Any], tuple[Tensor, Any]], x: Any) -> tuple[Any, tuple[Tensor, Any]]:
    """(∇f(x), (f(x), what else f returned)) where nothing differentiates again: no graph of the backward pass is built."""
    differentiated: Any = vjp(f, x, has_aux=True)
    value, pull, others = differentiated
    return pull(torch.ones_like(value), retain_graph=False, create_graph=False)[0], (value, others)


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
