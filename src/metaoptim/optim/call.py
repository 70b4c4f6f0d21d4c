"""One call of a rule, by whichever of its ways is quickest."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.checks import check_state, check_update
from metaoptim.core.types import Params, State, Step
from metaoptim.engine.graphs.guards import version


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
    """One call of a rule.

    Raises:
        ValueError: it doesn't return an update of its own shape for every weight, and a state of the form that it was given;
            or it writes into what it was given, which would move weights twice where a step is tried in two ways.
    """

    def one(*given: Any) -> tuple[Params, State]:
        quick = hasattr(rule, "quick") and not stacked
        updates, state = check_update(rule, rule.quick(*given, compiled) if quick else rule.update(*given), given[1])
        return updates, check_state(rule, given[2], state)

    before = _versions(work)
    moved: tuple[Params, State] = vmap(one, (None, 0, 0, 0, None))(*work) if stacked else one(*work)
    if written := [name for name, old, new in zip(_NAMES, before, _versions(work), strict=True) if old != new]:
        raise ValueError(
            f"`update` of the rule {type(rule).__name__} writes into {written[0]} that it is given: return new tensors, as in "
            "0.9 * m in place of m.mul_(0.9); weights are moved by what it returns."
        )
    return moved


_NAMES = ("ψ", "the gradients", "the state", "the weights", "the step")


def _versions(work: Work) -> list[list[int]]:
    """How often each part of what a rule is called with has been written into."""
    parts: list[list[Tensor]] = [[] for _ in work]
    for part, tree in zip(parts, work, strict=True):
        trees.take(tree, part)
    return [[version(x) for x in part] for part in parts]


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
