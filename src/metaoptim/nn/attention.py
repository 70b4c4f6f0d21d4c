"""Attention, written out: torch's fused kernels have no second derivative, and draw their own dropout masks."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.nn.noise import dropout


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ / √E + mask) V for (…, L, E), (…, S, E) and (…, S, V); rows that attend to nothing are zero, as in torch."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal or attn_mask is not None:
        blind = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    else:
        weights = scores.softmax(-1)
    return dropout(weights, dropout_p) @ value


def _never(tensors: Any) -> bool:
    return False


# torch's own function with three of its globals rebound: it keeps all its masks and options, and uses none of its kernels.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"scaled_dot_product_attention": scaled_dot_product_attention, "dropout": dropout, "has_torch_function": _never},
    "multi_head_attention",
    F.multi_head_attention_forward.__defaults__,
)
