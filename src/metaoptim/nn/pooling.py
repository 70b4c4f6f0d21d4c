"""Max-pooling whose second derivative can be traced under `vmap`; that of torch's own can't.

With i the positions of the windows' maxima, y = x[i]. Backwards, the cotangent of y is scattered to i; the cotangent of the
result is gathered at i again; and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

_aten = torch.ops.aten

Sizes = int | Sequence[int]


def _max_pool(axes: int, find: Callable[..., Any], spread: Callable[..., Tensor]) -> Callable[..., Any]:
    def max_pool(
        input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        how = (*(_each(size, axes) for size in (kernel_size, stride or kernel_size, padding, dilation)), ceil_mode)
        found = _maxima(input, lambda x: find(x, *how), lambda g, x, i: spread(g, x, *how, i), axes)
        return found if return_indices else found[0]

    return max_pool


max_pool2d = _max_pool(2, _aten.max_pool2d_with_indices, _aten.max_pool2d_with_indices_backward)
max_pool3d = _max_pool(3, _aten.max_pool3d_with_indices, _aten.max_pool3d_with_indices_backward)


def max_pool1d(
    input: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Windows of (…, L), computed as windows of (…, 1, L)."""
    (kernel,), (step,), (pad,), (gap,) = (_each(n, 1) for n in (kernel_size, stride or kernel_size, padding, dilation))
    found = max_pool2d(input.unsqueeze(-2), (1, kernel), (1, step), (0, pad), (1, gap), ceil_mode, return_indices)
    return (found[0].squeeze(-2), found[1].squeeze(-2)) if return_indices else found.squeeze(-2)


def adaptive_max_pool1d(input: Tensor, output_size: Sizes, return_indices: bool = False) -> Any:
    """`output_size` windows of (…, L)."""
    found = adaptive_max_pool2d(input.unsqueeze(-2), (1, *_each(output_size, 1)), return_indices)
    return (found[0].squeeze(-2), found[1].squeeze(-2)) if return_indices else found.squeeze(-2)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """`output_size` windows of (…, H, W); None keeps the size of an axis."""
    sizes = [own if size is None else size for size, own in zip(_each(output_size, 2), input.shape[-2:], strict=True)]
    found = _maxima(input, lambda x: _aten.adaptive_max_pool2d(x, sizes), _aten.adaptive_max_pool2d_backward, 2)
    return found if return_indices else found[0]


POOLING: Mapping[Any, Callable[..., Any]] = {
    F.max_pool1d: max_pool1d,
    F.max_pool2d: max_pool2d,
    F.max_pool3d: max_pool3d,
    torch.max_pool1d: max_pool1d,
    torch.max_pool2d: max_pool2d,
    torch.max_pool3d: max_pool3d,
    F.adaptive_max_pool1d: adaptive_max_pool1d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
}


def _each(size: Any, axes: int) -> list[Any]:
    """One value per axis."""
    sizes = list(size) if isinstance(size, Sequence) else [size]
    return sizes * axes if len(sizes) == 1 else sizes


def _maxima(x: Tensor, find: Callable[[Tensor], Any], spread: Callable[..., Tensor], axes: int) -> tuple[Tensor, Tensor]:
    """(y, i) = find(x); spread(ȳ, x, i) is the cotangent of x; i indexes the last `axes` axes of x, flattened."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _Maxima.apply
    return apply(x, find, spread, axes)


def _spread(g: Tensor, x: Tensor, i: Tensor, spread: Callable[..., Tensor], axes: int) -> Tensor:
    apply: Callable[..., Tensor] = _Spread.apply
    return apply(g, x, i, spread, axes)


class _Maxima(Function):
    """x -> (y, i)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, find: Any, spread: Any, axes: int) -> tuple[Tensor, Tensor]:
        y, i = find(x)
        return y, i

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.spread, ctx.axes = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])
        ctx.save_for_forward(x, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, i = ctx.saved_tensors
        return _spread(g, x, i, ctx.spread, ctx.axes), None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Any:
        return _read(t, ctx.saved_tensors[1], ctx.axes), None


class _Spread(Function):
    """ȳ -> x̄, which is linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, i: Tensor, spread: Any, axes: int) -> Tensor:
        slope: Tensor = spread(g, x, i)
        return slope

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, i, ctx.spread, ctx.axes = inputs
        ctx.save_for_backward(i)
        ctx.save_for_forward(x, i)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _read(g, ctx.saved_tensors[0], ctx.axes), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Any:
        x, i = ctx.saved_tensors
        return _spread(t, x, i, ctx.spread, ctx.axes)


def _read(x: Tensor, i: Tensor, axes: int) -> Tensor:
    return x.flatten(-axes).gather(-1, i.flatten(-axes)).view(i.shape)
