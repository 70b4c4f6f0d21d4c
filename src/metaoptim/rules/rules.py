"""Update rules that several papers share; a rule that belongs to one paper stands in that paper's file.

A rule maps gradients to updates that are ADDED to the weights. `clip` gives gradients, for use ahead of a step in `chain`.
"""

from __future__ import annotations

from typing import Any

import torch

from metaoptim.core import trees
from metaoptim.core.gradients import hold as hold
from metaoptim.core.types import Params, Rule, State


def _none(*_: Any) -> Any:
    return {}


def sgd(lr: float) -> Rule:
    """u = −lr · g."""

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        return {n: -lr * g for n, g in grads.items()}, state

    return Rule(_none, _none, update)


def momentum(lr: float, decay: float = 0.9) -> Rule:
    """m ← decay · m + g;  u = −lr · m  (Polyak 1964, as in `torch.optim.SGD`)."""

    def init(psi: Params, weights: Params) -> State:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        m = {n: decay * state[n] + g for n, g in grads.items()}
        return {n: -lr * x for n, x in m.items()}, m

    return Rule(_none, init, update)


def adam(lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Rule:
    """m ← b1·m + (1−b1)·g;  v ← b2·v + (1−b2)·g²;  u = −lr · m̂ / (√v̂ + eps)  (Kingma and Ba 2015).

    The denominator passes no meta-gradient: the slope of √v̂ is infinite at 0, where every unused weight is. The count of
    steps belongs to the state, so that moments which are carried from run to run keep their bias correction.
    """

    def init(psi: Params, weights: Params) -> State:
        zeros = {n: torch.zeros_like(w) for n, w in weights.items()}
        return {"m": zeros, "v": zeros, "t": next(iter(weights.values())).new_zeros(())}

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        t = state["t"] + 1
        m = {n: b1 * state["m"][n] + (1 - b1) * g for n, g in grads.items()}
        v = {n: b2 * state["v"][n] + (1 - b2) * g.square() for n, g in grads.items()}
        root = {n: hold((x / (1 - b2**t)).sqrt() + eps) for n, x in v.items()}
        return {n: -lr * (x / (1 - b1**t)) / root[n] for n, x in m.items()}, {"m": m, "v": v, "t": t}

    return Rule(_none, init, update)


def clip(norm: float | None = None, value: float | None = None) -> Rule:
    """Gradients scaled down to a Euclidean norm over all weights together, or clamped element by element to ±value."""
    bound = value if norm is None else norm
    if bound is None or (norm is not None and value is not None) or bound <= 0:
        raise ValueError(f"clip takes norm= or value=, one of them and positive; found norm={norm}, value={value}.")

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        if norm is None:
            return {n: g.clamp(-bound, bound) for n, g in grads.items()}, state
        # The squared norm is floored before the root: at 0 the root's slope would be infinite.
        size = trees.dot(grads, grads).clamp(min=bound**2).sqrt()
        return {n: g * (bound / size) for n, g in grads.items()}, state

    return Rule(_none, _none, update)


def chain(*rules: Rule) -> Rule:
    """Rules in order, each fed with what the one before it returned; the ψ of the i-th is named `i.…`."""

    def own(psi: Params, i: int) -> Params:
        return {n.removeprefix(f"{i}."): p for n, p in psi.items() if n.startswith(f"{i}.")}

    def meta(weights: Params) -> Params:
        return {f"{i}.{n}": p for i, rule in enumerate(rules) for n, p in rule.meta(weights).items()}

    def init(psi: Params, weights: Params) -> State:
        return tuple(rule.init(own(psi, i), weights) for i, rule in enumerate(rules))

    def update(psi: Params, grads: Params, state: State, weights: Params, k: int) -> tuple[Params, State]:
        after = []
        for i, rule in enumerate(rules):
            grads, new = rule.update(own(psi, i), grads, state[i], weights, k)
            after.append(new)
        return grads, tuple(after)

    return Rule(meta, init, update)
