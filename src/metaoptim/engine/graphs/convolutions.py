"""Convolutions in traced graphs on a CPU: channels last, and small ones as matrix products.

torch's own kernels are slow for images of few channels, for weight gradients, and in the default layout; docs/log.md has the
measurements. Other devices keep torch's kernels. These functions replace `aten` operators below autograd, so they need no
derivatives. They sum in another order, so results differ by rounding. Sizes alone decide which way is taken, never a
measurement, so that every process builds the same graph (docs/decisions/0014).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

FEW = 32  # numbers under the kernel's window up to which a matrix product is always faster
FORWARD = 2**18  # elements of the column matrix up to which a product is faster than the kernel
WEIGHTS = 2**22  # the same, for the weight gradient


def convolution(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> Any:  # fmt: skip
    """`aten.convolution`; NotImplemented where torch's kernel should run unchanged."""
    if not _ours(x, w, transposed):
        return NotImplemented
    rows, window = _sizes(x, w, stride, padding, dilation, groups)
    if window > FEW and rows * window * groups > FORWARD:
        return _channels_last(_aten.convolution.default, (x, w), bias, stride, padding, dilation, False, output_padding, groups)
    count, out = x.shape[0], w.shape[0] // groups
    height, width = _extent(x, w, stride, padding, dilation)
    y = columns(x, w, stride, padding, dilation, groups) @ matrix(w, groups)
    y = y.view(groups, count, height, width, out).permute(1, 0, 4, 2, 3).reshape(count, groups * out, height, width)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def convolution_backward(
    g: Tensor, x: Tensor, w: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int, mask: Sequence[bool],
) -> Any:  # fmt: skip
    """`aten.convolution_backward`; NotImplemented where torch's kernel should run unchanged."""
    if not _ours(x, w, transposed):
        return NotImplemented
    rest = (bias_sizes, stride, padding, dilation, False, output_padding, groups)
    rows, window = _sizes(x, w, stride, padding, dilation, groups)
    if not mask[1] or rows * window * groups > WEIGHTS:
        return _channels_last(_aten.convolution_backward.default, (g, x, w), *rest, mask)
    out, (high, wide) = w.shape[0] // groups, w.shape[2:]
    matrix = g.reshape(g.shape[0], groups, out, *g.shape[2:]).permute(1, 0, 3, 4, 2).reshape(groups, rows, out)
    of_w = columns(x, w, stride, padding, dilation, groups).mT @ matrix
    of_w = of_w.view(groups, high, wide, -1, out).permute(0, 4, 3, 1, 2).reshape(w.shape)
    of_x = _aten.convolution_backward.default(g, x, w, *rest, [True, False, False])[0] if mask[0] else None
    return of_x, of_w, g.sum((0, 2, 3)) if mask[2] else None


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: convolution,
    _aten.convolution_backward.default: convolution_backward,
}


def _ours(x: Tensor, w: Tensor, transposed: bool) -> bool:
    return x.device.type == "cpu" and x.ndim == 4 and not transposed and min(*x.shape, *w.shape) > 0


def _channels_last(kernel: Callable[..., Any], tensors: Sequence[Tensor], *rest: Any) -> Any:
    """The kernel on channels-last tensors; NotImplemented if they have that layout already.

    Tracing decomposes the inner call too, so it arrives here once more; NotImplemented ends the recursion.
    """
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors):
        return NotImplemented
    return kernel(*(x.contiguous(memory_format=torch.channels_last) for x in tensors), *rest)


def _extent(x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output."""
    high, wide = ((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return high, wide


def _sizes(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[int, int]:
    """Rows of one group's column matrix, and how many numbers lie under the window."""
    return x.shape[0] * prod(_extent(x, w, stride, padding, dilation)), prod(w.shape[1:])


def columns(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The column matrix (im2col), (groups, rows, window): what lies under the window at each position, channels last."""
    (count, channels), (high, wide) = x.shape[:2], _extent(x, w, stride, padding, dilation)
    down, right = padding
    x = _aten.constant_pad_nd(x.permute(0, 2, 3, 1), [0, 0, right, right, down, down]).contiguous()
    a, b, c, d = x.stride()
    inner = channels // groups
    windows = x.as_strided(
        (groups, count, high, wide, w.shape[2], w.shape[3], inner),
        (inner * d, a, b * stride[0], c * stride[1], b * dilation[0], c * dilation[1], d),
    )
    return windows.reshape(groups, count * high * wide, -1)


def matrix(w: Tensor, groups: int) -> Tensor:
    """The weights as (groups, window, outputs)."""
    return w.reshape(groups, -1, *w.shape[1:]).permute(0, 3, 4, 2, 1).flatten(1, 3)
