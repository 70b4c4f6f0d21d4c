"""What is given as a rule or as its ψ: a check says nothing, or raises a ValueError of one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_step
from metaoptim.core.types import MetaParams, Params, Rule, State


def check_rule(rule: Any, taker: str) -> None:
    """A rule that takes a step, and neither its class nor its name."""
    lacking = [n for n in ("start", "init", "update") if not callable(getattr(rule, n, None))]
    if isinstance(rule, type) or lacking:
        found = f"the class {rule.__name__}, which is to be called" if isinstance(rule, type) else brief(rule)
        found += f", which has no {' and no '.join(f'`{n}`' for n in lacking)}" if 0 < len(lacking) < 3 else ""
        raise ValueError(f"{taker} takes a rule, such as mo.lopt.Celo2() or mo.rules.Muon(0.02); found {found}.")
    check_step(rule)


def first(weights: Params) -> Tensor:
    """One of the weights that ψ is drawn for, in whose floats it is."""
    if not weights:
        raise ValueError("start is given no weights, in whose floats ψ is drawn: give some by name, as {'w': torch.zeros(1)}.")
    return next(iter(weights.values()))


def started(rule: Rule, weights: Params, generator: torch.Generator) -> Params:
    """ψ as the rule draws it for these weights."""
    found: Any = rule.start(weights, generator)
    wanted = "it must return a dictionary of floating-point tensors by name, which is empty where nothing is learnt."
    if not isinstance(found, Mapping):
        raise ValueError(f"`start` of {brief(rule)} returned {brief(found)}; {wanted}")
    if odd := [n for n, x in found.items() if not isinstance(x, Tensor) or not x.is_floating_point()]:
        kind = getattr(found[odd[0]], "dtype", type(found[odd[0]]).__name__)
        raise ValueError(f"`start` of {brief(rule)} returned {kind} for {odd[0]!r}; {wanted}")
    if odd := [n for n, x in found.items() if not x.is_meta and not x.isfinite().all()]:
        raise ValueError(
            f"`start` of {brief(rule)} returned numbers that are not finite for {odd[0]!r}: nothing can be learnt there."
        )
    return dict(found)


def begun(rule: Rule, psi: Params, weights: Params) -> State:
    """The rule's state at the start. Raises a ValueError where it isn't made of tensors, as the states of optimizers are."""
    state = rule.init(psi, weights)
    if odd := [x for x in trees.flatten(state) if not isinstance(x, Tensor)]:
        raise ValueError(
            f"`init` of {brief(rule)} returned a state with {brief(odd[0])} in it; it must return tensors alone, in tuples and "
            "dictionaries: torch.tensor(0) for a count, an empty dictionary for nothing."
        )
    return state


def check_psi(rule: Rule, psi: Any, what: str, weights: Params | None = None) -> None:
    """ψ has the names and shapes that belong to the rule (none is needed where it has none), for these weights.

    what: how a sentence calls it. weights: none given, whatever they are called.
    """
    given = {} if psi is None else psi
    if not isinstance(given, Mapping) or not all(isinstance(x, Tensor) for x in given.values()):
        found = "a φ, of which it is the .rule" if isinstance(given, MetaParams) else brief(given)
        raise ValueError(f"{what} must be a dictionary of tensors by name, such as run.phi.rule; found {found}.")
    like: dict[str, Tensor] = rule.start(weights or {"w": torch.zeros(2, 2)}, torch.Generator())
    if {n: x.shape for n, x in given.items()} == {n: x.shape for n, x in like.items()}:
        return
    if not given:
        numbers = sum(x.numel() for x in like.values())
        raise ValueError(f"{what} is missing: {brief(rule)} has one of {numbers:,} numbers; give it, such as run.phi.rule.")
    odd = min(n for n in given.keys() | like.keys() if n not in given or n not in like or given[n].shape != like[n].shape)
    found, expected = (f"of shape {tuple(x[odd].shape)}" if odd in x else "missing" for x in (given, like))
    here = " for these weights" if weights else ""
    raise ValueError(
        f"{what}: {odd!r} is {found}, where {type(rule).__name__} has it {expected}{here}; give the ψ of this rule."
    )
