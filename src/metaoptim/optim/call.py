"""One call of a rule, by whichever of its ways is quickest."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core.checks import check_update
from metaoptim.core.types import Params, State, Step


class Work(NamedTuple):
    """What a rule is called with."""

    psi: Params
    grads: Params
    state: State
    weights: Params
    step: Step


class Unjudged(Step):
    """A step of which nobody has told the loss."""

    @property
    def loss(self) -> Tensor:
        raise ValueError(
            "The rule reads the loss, which a closure alone tells: call optimizer.step(closure) with one that computes "
            "gradients and returns the loss. (torch.compile(optimizer.step) asks for it too: give compile=True in its place.)"
        )


def update(rule: Any, stacked: bool, work: Work, compiled: bool = False) -> tuple[Params, State]:
    """One call of a rule. Raises a ValueError where it doesn't return an update of its own shape for every weight."""

    def one(*given: Any) -> tuple[Params, State]:
        quick = hasattr(rule, "quick") and not stacked
        found = rule.quick(*given, compiled) if quick else rule.update(*given)
        return check_update(rule, found, given[1])

    moved: tuple[Params, State] = vmap(one, (None, 0, 0, 0, None))(*work) if stacked else one(*work)
    return moved


def raised(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """In float32 at least: means of small numbers are lost in floats of 16 bits."""
    found: Any = x
    raised: Tensor = found.detach().to(dtype or torch.promote_types(found.dtype, torch.float32))
    return raised


def memory(x: Tensor | None) -> int:
    """Equal for tensors that share memory; 0 where it can't be told, as of tensors that only stand for others."""
    with suppress(RuntimeError, NotImplementedError):
        return 0 if x is None else int(x.untyped_storage().data_ptr())
    return 0
