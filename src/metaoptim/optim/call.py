"""One call of a rule, by whichever of its ways is quickest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core.types import Params, State, Step


class Work(NamedTuple):
    """What a rule is called with."""

    psi: Params
    grads: Params
    state: State
    weights: Params
    step: Step


def update(rule: Any, stacked: bool, work: Work, compiled: bool = False) -> tuple[Params, State]:
    """One call of a rule."""
    moved: tuple[Params, State]
    if stacked:
        moved = vmap(rule.update, (None, 0, 0, 0, None))(*work)
    else:
        moved = rule.quick(*work, compiled) if hasattr(rule, "quick") else rule.update(*work)
    return moved


def raised(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """In float32 at least: means of small numbers are lost in floats of 16 bits."""
    found: Any = x
    raised: Tensor = found.detach().to(dtype or torch.promote_types(found.dtype, torch.float32))
    return raised
