"""torch's losses that a meta-gradient can't always go through, written out.

F.mse_loss, F.huber_loss and F.soft_margin_loss have no forward mode (traced, it ends the process); F.gaussian_nll_loss and
F.one_hot ask for a value, which neither `vmap` nor a graph can give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.callers import warn


def _reduced(torchs: Callable[..., Tensor], each: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A loss of torch with the same arguments, computed from the losses of single elements."""

    def loss(
        input: Tensor, target: Tensor, *deprecated: Any, reduction: str = "mean", weight: Tensor | None = None, **given: Any
    ) -> Tensor:
        given = {name: value for name, value in given.items() if value is not None}
        if any(x is not None for x in deprecated) or given.keys() - options.keys():  # old ways of asking for a reduction
            return torchs(input, target, *deprecated, reduction=reduction, **given)
        input, target = _alike(torchs, input, target)
        found = each(input, target, **(options | given))
        if weight is not None:
            found = found * weight
            return found.sum() / weight.expand_as(found).sum() if reduction == "mean" else _reduce(found, reduction)
        return _reduce(found, reduction)

    return loss


def told(torchs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of torch that tells of shapes which differ in our words, once for sets of all sizes."""

    def loss(input: Tensor, target: Tensor, *args: Any, **given: Any) -> Tensor:
        return torchs(*_alike(torchs, input, target), *args, **given)

    return loss


def _alike(torchs: Callable[..., Tensor], input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Both in one shape; a warning where they were in two."""
    if input.shape == target.shape:
        return input, target
    output, given = (f"({', '.join(['B', *map(str, x.shape[1:])])})" if x.ndim else "()" for x in (input, target))
    warn(
        f"{torchs.__name__}: the targets have shape {given} and the model's outputs {output}; they are broadcast, which is "
        "rarely meant: reshape the targets or the model's last layer."
    )
    spread: Any = torch.broadcast_tensors
    both: tuple[Tensor, ...] = spread(input, target)
    return both


def _reduce(x: Tensor, reduction: str) -> Tensor:
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


def _square(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square()


def _huber(x: Tensor, y: Tensor, delta: float) -> Tensor:
    gap = (x - y).abs()
    return torch.where(gap <= delta, 0.5 * gap.square(), delta * (gap - 0.5 * delta))


def _soft_margin(x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * x)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """As torch's, which looks at the values even where it is told how many classes there are."""
    if num_classes < 1:
        return F.one_hot(tensor, num_classes)
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).to(torch.int64)


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """As torch's, but for its look at the signs of the variances, which are clamped all the same."""
    var = var if isinstance(var, Tensor) else torch.full_like(input, var)
    if var.shape != input.shape and input.shape[:-1] == var.shape:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()  # the derivative is that of no clamp, as in torch
    found = 0.5 * (var.log() + (input - target).square() / var)
    return _reduce(found + 0.5 * math.log(2 * math.pi) if full else found, reduction)


LOSSES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.mse_loss: _reduced(F.mse_loss, _square),
    F.huber_loss: _reduced(F.huber_loss, _huber, delta=1.0),
    F.soft_margin_loss: _reduced(F.soft_margin_loss, _soft_margin),
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.one_hot: one_hot,
}
