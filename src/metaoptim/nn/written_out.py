"""While a model or a loss runs, replaces torch functions that a meta-gradient can't go through by ones that it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metaoptim.core.gradients import by_autograd
from metaoptim.nn.attention import multi_head_attention, scaled_dot_product_attention
from metaoptim.nn.layers import BATCH_NORMS
from metaoptim.nn.losses import LOSSES, told
from metaoptim.nn.noise import RANDOM, one_pass
from metaoptim.nn.norms import batch_norm, group_norm
from metaoptim.nn.pooling import POOLING
from metaoptim.nn.recurrent import RECURRENT


@contextmanager
def written_out(needed: bool = True) -> Iterator[None]:
    """A forward pass in which certain torch functions run as they are written out in this package.

    torch's recurrent kernels have no batching rule for weights. The second derivative of its fused attention and embedding bags
    is missing, that of its max-pooling and group norm can't be traced under `vmap`, and that of its weight norm is wrong. Its
    dropout draws other numbers in another order of evaluation, some of its losses have no forward mode (see `losses`), and its
    batch norm with stored statistics gives a wrong second derivative under `vmap`. Weights, names, modules and results stay
    torch's. Where gradients are plain autograd's, on a CPU, what autograd can do runs as torch has it.
    """
    if not needed:
        yield
        return
    with one_pass(), _Replaced(_ALWAYS if by_autograd() else _OURS):
        yield


@contextmanager
def keyed() -> Iterator[None]:
    """Code that is no forward pass, such as a rule's, in which torch's random functions draw by the key too."""
    with one_pass(), _Replaced(RANDOM):
        yield


def needs_written_out(module: nn.Module) -> bool:
    """Whether `written_out` could change anything; plain layers, torch's and ours, are spared its small cost."""
    return any(
        isinstance(m, _CALLERS)
        or m._forward_pre_hooks
        or m._forward_hooks
        or not type(m).__module__.startswith(("torch.nn.modules.", "metaoptim.nn."))
        for m in module.modules()
    )


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g · v / ‖v‖, with the norm over every axis but `dim` (−1: over all)."""
    axes = [i for i in range(v.ndim) if dim == -1 or i != dim]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The sum, mean or maximum of the embeddings of bags (B, L), as (B, E), ignoring those of `padding_idx`."""
    if input.ndim != 2:
        raise ValueError("bags of embeddings that begin at offsets can't be mapped over; give bags (B, L), with a padding_idx.")
    x, counted = F.embedding(input, weight), torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    if mode == "max":
        most = x.masked_fill(~counted[..., None], -math.inf).amax(1)
        return most.masked_fill(~counted.any(1, keepdim=True), 0.0)
    share = counted.to(x.dtype) if per_sample_weights is None else counted * per_sample_weights
    total = (x * share[..., None]).sum(1)
    return total / counted.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


def _unless_cpu(torchs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """torch's recurrent function on a CPU, where it has a second derivative, and ours elsewhere or where it drops out."""

    def run(x: Tensor, *args: Any) -> Any:
        drops = len(args) > 6 and args[4] and args[5]
        return (torchs if x.device.type == "cpu" and not drops else ours)(x, *args)

    return run


_ALWAYS: Mapping[Any, Callable[..., Any]] = {
    **RANDOM,
    **{torchs: _unless_cpu(torchs, ours) for torchs, ours in RECURRENT.items()},
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.embedding_bag: embedding_bag,
    F.batch_norm: batch_norm,
    torch._weight_norm: weight_norm,
    **{loss: told(loss) for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)},
}
_OURS: Mapping[Any, Callable[..., Any]] = {**_ALWAYS, **RECURRENT, **POOLING, **LOSSES, F.group_norm: group_norm}

_CALLERS = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.EmbeddingBag,
    nn.GroupNorm,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    *BATCH_NORMS,
)


class _Replaced(TorchFunctionMode):
    def __init__(self, ours: Mapping[Any, Callable[..., Any]]) -> None:
        TorchFunctionMode.__init__(self)
        self.ours = ours

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.ours.get(func, func)(*args, **(kwargs or {}))
