"""Random draws as a function of a key: the same in a loop, under vmap, in a thread, and when a step is recomputed.

torch's own generator gives other numbers in another order of evaluation. Two ways of computing a meta-gradient would then give
two different gradients, and a step that is recomputed in the backward pass would not be the step that was taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]
Shape = Sequence[int]

_SPAN = 1 << 31  # keys and draws lie below this
_SELU = 1.7580993408473766  # minus SELU's limit at minus infinity: alpha dropout puts that limit in place of what it drops

_KEY: ContextVar[tuple[Tensor, int | Tensor, int] | None] = ContextVar("key", default=None)
_DRAWS: ContextVar[Iterator[int] | None] = ContextVar("draws", default=None)


@contextmanager
def noise(key: Tensor, step: int | Tensor = 0, part: int = 0) -> Iterator[None]:
    """Inside, a draw depends only on the key, the stage 2 · step + part, and how many draws came before it in the forward pass.

    Args:
        key: the task's key, an int64 scalar with 0 <= key < 2^31; it may be mapped over.
        step, part: separate draws that share a key, such as those of different inner steps.
    """
    token = _KEY.set((key, step, part))
    try:
        yield
    finally:
        _KEY.reset(token)


@contextmanager
def one_pass() -> Iterator[None]:
    """One forward pass: inside, draws are counted from zero, so that the same pass draws the same numbers again."""
    token = _DRAWS.set(count())
    try:
        yield
    finally:
        _DRAWS.reset(token)


def draw(shape: Shape, device: torch.device) -> Tensor | None:
    """Uniform integers in 0 … 2^31 − 1; None outside `noise` or outside a pass, where torch's generator is to be used."""
    source, draws = _KEY.get(), _DRAWS.get()
    if source is None or draws is None:
        return None
    key, step, part = source
    seed = _seed(key, 2 * step + part, next(draws))
    return _mix(_mix(torch.arange(math.prod(shape), device=device).view(tuple(shape))) + seed)


def _seed(key: Tensor, stage: int | Tensor, drawn: int | Tensor) -> Tensor:
    return _mix(_mix(key + 0x1E3779B9 * (stage + 1)) + 0x3C6EF372 * (drawn + 1))


def _mix(x: Tensor) -> Tensor:
    """x modulo 2^31, scrambled by a bijection; no product reaches 2^63."""
    x = x & (_SPAN - 1)
    x = (x ^ (x >> 16)) * 0x7FEB352D & (_SPAN - 1)
    x = (x ^ (x >> 15)) * 0xC2B2AE35 & (_SPAN - 1)
    return x ^ (x >> 16)


def _elements(x: Tensor) -> Shape:
    """The shape of a mask with one entry per element."""
    return x.shape


def _channels(x: Tensor) -> Shape:
    """The shape of a mask with one entry per channel of (B, C, …)."""
    return (*x.shape[:2], *(1 for _ in x.shape[2:]))


def _channels_of_one(ndim: int) -> Callable[[Tensor], Shape]:
    """The same, except that an input with `ndim` axes is one example (C, …)."""
    return lambda x: (x.shape[0], *(1 for _ in x.shape[1:])) if x.ndim == ndim else _channels(x)


def _dropping(torchs: Callable[..., Tensor], mask: Callable[[Tensor], Shape], alpha: bool = False) -> Callable[..., Tensor]:
    """One of torch's dropout functions, with its mask (of the given shape) drawn by `draw`."""

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        drawn = draw(mask(x), x.device) if training and 0 < p < 1 else None
        if drawn is None:
            return torchs(x, p, training, inplace)
        kept = drawn >= round(p * _SPAN)
        if not alpha:
            return x * (kept.to(x.dtype) / (1 - p))
        scale: float = ((1 - p) * (1 + p * _SELU**2)) ** -0.5
        return torch.where(kept, x, -_SELU) * scale + scale * p * _SELU

    return drop


def _uniform(like: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Numbers strictly between 0 and 1, in the shape of a tensor; they have 23 bits, which every float but a half can hold."""
    drawn = draw(like.shape, like.device)
    return None if drawn is None else _between(drawn, dtype or like.dtype)


def _between(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    return ((drawn >> 8).to(dtype) + 0.5) / (1 << 23)


def _rand_like(x: Tensor, *, dtype: torch.dtype | None = None, **other: Any) -> Tensor:
    u = _uniform(x, dtype)
    return torch.rand_like(x, dtype=dtype, **other) if u is None else u


def uniform(likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers strictly between 0 and 1 in the shapes of some tensors: functions of the key inside `noise`, else torch's own."""
    with one_pass():
        return {n: _rand_like(x) for n, x in likes.items()}


def _randn_like(x: Tensor, *, dtype: torch.dtype | None = None, **other: Any) -> Tensor:
    u, v = _uniform(x, dtype), _uniform(x, dtype)
    if u is None or v is None:
        return torch.randn_like(x, dtype=dtype, **other)
    return _normal(u, v)


def _normal(u: Tensor, v: Tensor) -> Tensor:
    return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()


def normals(key: Tensor, shapes: Sequence[Shape], dtype: torch.dtype, stage: int) -> list[Tensor]:
    """Standard normal numbers as functions of a key: in shapes[i] those that `randn_like` draws first at stage + i.

    They are drawn together, with as many operators as one draw has (see `noise`).
    """
    sizes = [math.prod(shape) for shape in shapes]
    # Which changes nothing, but that Inductor, for a GPU, would compute what it takes for indices in 32 bits.
    stages, drawn = (torch.arange(n, device=key.device) & (_SPAN - 1) for n in (len(sizes), 2))
    seeds = _seed(key, stage + stages, drawn.unsqueeze(1))
    places = torch.cat([torch.arange(n, device=key.device) for n in sizes])
    own = torch.cat([seeds[:, i : i + 1].expand(2, n) for i, n in enumerate(sizes)], 1)
    u, v = _between(_mix(_mix(places) + own), dtype)
    return [x.view(tuple(shape)) for x, shape in zip(torch.split(_normal(u, v), sizes), shapes, strict=True)]


def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Tensor:
    u = _uniform(x) if training else None
    return F.rrelu(x, lower, upper, training) if u is None else torch.where(x >= 0, x, x * (lower + (upper - lower) * u))


def _unkeyed(name: str, torchs: Function) -> Function:
    """One of torch's random functions, refused while a key determines what is drawn."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if _KEY.get() is not None:
            raise ValueError(
                f"the model or the rule draws random numbers by torch's {name}, and others whenever a step is computed again; "
                "draw them by torch.rand_like, torch.randn_like or dropout, which this library keeps the same."
            )
        return torchs(*args, **kwargs)

    return run


dropout = _dropping(F.dropout, _elements)

_OTHERS: dict[str, Function] = {
    **{n: getattr(torch, n) for n in ("rand", "randn", "randint", "randint_like", "randperm", "normal", "poisson")},
    **{n: getattr(torch, n) for n in ("bernoulli", "multinomial")},
    **{n: getattr(Tensor, n) for n in ("normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_")},
    **{n: getattr(Tensor, n) for n in ("log_normal_", "bernoulli_")},
    **{f"Tensor.{n}": getattr(Tensor, n) for n in ("bernoulli", "multinomial")},
    **{n: getattr(F, n) for n in ("gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d")},
}

RANDOM: Mapping[Function, Function] = {
    F.dropout: dropout,
    torch.dropout: lambda input, p, train: dropout(input, p, train),
    F.dropout1d: _dropping(F.dropout1d, _channels_of_one(2)),
    F.dropout2d: _dropping(F.dropout2d, _channels),
    F.dropout3d: _dropping(F.dropout3d, _channels_of_one(4)),
    F.alpha_dropout: _dropping(F.alpha_dropout, _elements, alpha=True),
    F.feature_alpha_dropout: _dropping(F.feature_alpha_dropout, _channels, alpha=True),
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    F.rrelu: _rrelu,
    **{function: _unkeyed(name, function) for name, function in _OTHERS.items()},
}
