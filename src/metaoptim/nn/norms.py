"""Normalisation layers that are correct under every function transform, and the policy that says whose statistics they use.

torch's own layers keep running statistics, which no transform can update. And the batching rules of `batch_norm` and
`layer_norm` give a wrong second derivative if the outer gradient is taken outside `vmap` (pytorch/functorch#534). The layers
here are written from primitives instead. Parameters and buffers have torch's names, so state dicts are interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaoptim.core.gradients import by_autograd
from metaoptim.nn.layers import BATCH_NORMS

_TORCHS: Callable[..., Tensor] = F.batch_norm  # whose derivatives are right where they are autograd's, and faster


class _Statistics(NamedTuple):
    frozen: bool = False
    rows: int | None = None


_STATISTICS: ContextVar[_Statistics | None] = ContextVar("statistics", default=None)


@contextmanager
def statistics(frozen: bool = False, rows: int | None = None) -> Iterator[None]:
    """Inside, `BatchNorm` uses its stored statistics (`frozen`), or those of the batch's first `rows` examples (None: all)."""
    token = _STATISTICS.set(_Statistics(frozen, rows))
    try:
        yield
    finally:
        _STATISTICS.reset(token)


def centred(x: Tensor, axes: tuple[int, ...], rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x − mean, the mean and the biased variance over some axes, which are kept; both of the first `rows` examples (None: all).

    Written to make few passes over memory, backwards too: `torch.var_mean` is many times slower on a CPU, and the derivatives
    of `mean` and of a subtraction divide and negate whole tensors where a sum would do.
    """
    source = x if rows is None else x[:rows]
    part = 1 / prod(source.shape[axis] for axis in axes)
    mean = source.sum(axes, keepdim=True) * part
    gap = x + -mean
    var = (gap if rows is None else gap[:rows]).square().sum(axes, keepdim=True) * part
    return gap, mean, var


class BatchNorm(nn.Module):
    """y = (x − mean) / √(var + eps) · weight + bias, per channel, for inputs (B, C, …) of any number of axes.

    Statistics are the batch's (biased variance), or the stored ones, which a forward pass never changes. `statistics` decides
    which; outside it, the stored ones are used if `stored` is set, as loading a state dict does whose statistics are counted.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, eps: float = 1e-5, affine: bool = True) -> None:
        nn.Module.__init__(self)
        self.features, self.eps, self.stored, self.recording = features, eps, False, False
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # as torch's: 0 where no statistics are stored
        register: Any = self.register_load_state_dict_post_hook
        register(_as_saved)

    def reset_parameters(self) -> None:
        _begin(self)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        frozen, rows = _STATISTICS.get() or _Statistics(frozen=self.stored and not self.recording)
        if by_autograd() and rows is None and not self.recording:
            stored = (self.running_mean, self.running_var) if frozen else (None, None)
            return _TORCHS(x, *stored, self.weight, self.bias, not frozen, 0.0, self.eps)
        if frozen:
            mean, var = self.running_mean.view(shape), self.running_var.view(shape)
            gap = x - mean
        else:
            gap, mean, var = centred(x, (0, *range(2, x.ndim)), rows)
        if self.recording:
            self.running_mean.copy_(mean.detach().flatten())
            self.running_var.copy_(var.detach().flatten())
        scale = (var + self.eps).rsqrt()
        y = gap * (scale if self.weight is None else scale * self.weight.view(shape))
        return y if self.bias is None else y + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, affine={self.weight is not None}"


def _as_saved(module: nn.Module, keys: object) -> None:
    """The use of stored statistics is part of a state dict."""
    if isinstance(module, BatchNorm):
        module.stored = bool(module.num_batches_tracked)


class LayerNorm(nn.Module):
    """y = (x − mean) / √(var + eps) · weight + bias over the last axes of each example, whose shape is given."""

    def __init__(self, shape: int | Sequence[int], eps: float = 1e-5, affine: bool = True, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.shape, self.eps = (shape,) if isinstance(shape, int) else tuple(shape), eps
        self.weight = nn.Parameter(torch.ones(self.shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(self.shape)) if affine and bias else None

    def reset_parameters(self) -> None:
        _begin(self)

    def forward(self, x: Tensor) -> Tensor:
        if by_autograd():
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        gap, _, var = centred(x, tuple(range(-len(self.shape), 0)))
        y = gap * (var + self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}, affine={self.weight is not None}"


def _begin(layer: BatchNorm | LayerNorm) -> None:
    """As the identity."""
    for own, value in ((layer.weight, 1.0), (layer.bias, 0.0)):
        if own is not None:
            nn.init.constant_(own, value)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch's batch norm on the batch's own statistics, or on stored ones, which it leaves as they are."""
    policy = _STATISTICS.get() or _Statistics()
    own = running_mean is None
    if by_autograd() and (own or policy.frozen or not training):
        return _TORCHS(input, running_mean, running_var, weight, bias, own, 0.0, eps)
    shape = (1, -1) + (1,) * (input.ndim - 2)
    if running_mean is not None and running_var is not None and (policy.frozen or not training):
        mean, var = running_mean.view(shape), running_var.view(shape)
        gap = input - mean
    elif running_mean is not None:
        raise ValueError(
            "a batch norm in training mode would mix its running statistics across tasks: call the model's eval(), or convert "
            "it by metaoptim.nn.convert(module)."
        )
    else:
        gap, mean, var = centred(input, (0, *range(2, input.ndim)))
    scale = (var + eps).rsqrt()
    y = gap * (scale if weight is None else scale * weight.view(shape))
    return y if bias is None else y + bias.view(shape)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over groups of channels of each example, for inputs (B, C, …)."""
    gap, _, var = centred(input.reshape(input.shape[0], num_groups, -1), (-1,))
    y = (gap * (var + eps).rsqrt()).reshape(input.shape)
    shape = (1, -1) + (1,) * (input.ndim - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def convert(module: nn.Module) -> nn.Module:
    """Replaces a module's batch and layer norms, in place, by those of this file.

    Weights are kept, as the same Parameter objects; running statistics are kept for the policy `frozen`. Returns the
    module (a new one only if the module itself is a norm).
    """
    for name, child in module._modules.items():  # named_children() would skip the second name of a shared norm
        if child is not None:
            setattr(module, name, convert(child))
    if isinstance(module, BATCH_NORMS):
        with _place_of(module):
            batch = BatchNorm(module.num_features, module.eps, affine=False)
        batch.weight, batch.bias = module.weight, module.bias
        if module.running_mean is not None and module.running_var is not None:
            batch.running_mean, batch.running_var = module.running_mean, module.running_var
        return batch
    if isinstance(module, nn.LayerNorm):
        layer = LayerNorm(module.normalized_shape, module.eps, affine=False)
        layer.weight, layer.bias = module.weight, module.bias
        return layer
    return module


def batch_norms(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights of a module's batch norms, torch's and ours."""
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, (BatchNorm, *BATCH_NORMS))]
    return tuple(f"{n}.{leaf}".lstrip(".") for n, m in norms for leaf, _ in m.named_parameters())


def _place_of(module: nn.Module) -> torch.device:
    """Where a layer's tensors are; entered, where those without a device of their own are made."""
    return next((x.device for x in (*module.parameters(), *module.buffers())), torch.get_default_device())


def store_statistics(module: nn.Module, x: Tensor) -> nn.Module:
    """Runs x through the module and freezes its `BatchNorm` layers at the statistics that they see; returns the module."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for layer in norms:
        layer.recording = True
    try:
        with torch.no_grad():
            module(x)
    finally:
        for layer in norms:
            layer.recording = False
    for layer in norms:
        layer.stored = True
        layer.num_batches_tracked.fill_(1)
    return module
