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


class Unjudged(Step):
    """A step of which nobody has told the loss."""

    @property
    def loss(self) -> Tensor:
        raise ValueError(
            "The rule reads the loss, which a closure alone tells: call optimizer.step(closure) with one that computes "
            "gradients and returns the loss."
        )


def update(rule: Any, stacked: bool, work: Work, compiled: bool = False) -> tuple[Params, State]:
    """One call of a rule. Raises a ValueError where it doesn't return an update of its own shape for every weight."""

    def one(*given: Any) -> tuple[Params, State]:
        quick = hasattr(rule, "quick") and not stacked
        found = rule.quick(*given, compiled) if quick else rule.update(*given)
        return _checked(rule, found, given[1])

    moved: tuple[Params, State] = vmap(one, (None, 0, 0, 0, None))(*work) if stacked else one(*work)
    return moved


def raised(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """In float32 at least: means of small numbers are lost in floats of 16 bits."""
    found: Any = x
    raised: Tensor = found.detach().to(dtype or torch.promote_types(found.dtype, torch.float32))
    return raised


def _checked(rule: Any, found: Any, grads: Params) -> tuple[Params, State]:
    who = f"`update` of the rule {type(rule).__name__}"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], dict):
        raise ValueError(f"{who} returned {type(found).__name__}; it must return (updates by name, state).")
    for name, g in grads.items():
        shape = getattr(found[0].get(name), "shape", None)
        if shape != g.shape:
            told = "no update" if shape is None else f"an update of shape {tuple(shape)}"
            raise ValueError(
                f"{who} returned {told} for the weight {name!r} of shape {tuple(g.shape)}; it must return one of the same "
                "shape for every weight, zeros where one is to stay."
            )
    return found
