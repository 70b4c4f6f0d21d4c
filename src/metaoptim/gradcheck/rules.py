"""An update rule as a function of its own: does its state matter, and is it differentiable?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.gradients import recorded, replayed
from metaoptim.core.types import Params, Rule, State, Step
from metaoptim.gradcheck.parts import GRADIENT, Part, draws, floats, random_like

STEPS = 3


def inert(rule: Rule, psi: Params, weights: Params) -> str | None:
    """A sentence where the rule keeps a state that no update of the next steps depends on; else None."""
    with draws(weights):
        return _inert(rule, psi, weights)


def _inert(rule: Rule, psi: Params, weights: Params) -> str | None:
    state = rule.init(psi, weights)
    if not trees.flatten(state):
        return None
    gradients = [random_like(weights, k) for k in range(STEPS)]
    shift = random_like(floats(state), 0)
    shaken = [x + 1 + shift[str(i)].abs() if str(i) in shift else x + 1 for i, x in enumerate(trees.flatten(state))]
    other = trees.unflatten(shaken, state)
    if _equal(_updates(rule, psi, weights, state, gradients), _updates(rule, psi, weights, other, gradients)):
        return (
            "the rule keeps a state that never reaches its updates: `update` doesn't read it; compute the updates from it, "
            "or return {} in `init`."
        )
    _, after = rule.update(psi, gradients[0], state, weights, _step(0, weights))
    elsewhere = rule.init(psi, trees.add(weights, gradients[0]))
    if _equal(after, state) and _equal(elsewhere, state):  # one that hangs on the weights at the start may stay as it is
        return (
            "the rule keeps a state that never reaches its updates: `update` returns the state that it was given, so that "
            "nothing is remembered; return (updates, the new state)."
        )
    return None


def rule_part(rule: Rule, psi: Params, weights: Params) -> Part:
    """The updates of a few steps, as a function of gradients, weights and ψ; what the rule holds is as it is here."""
    grads = {f"{GRADIENT}{k} {n}": g for k in range(STEPS) for n, g in random_like(weights, k).items()}

    def function(at: Params) -> list[Params]:
        own, start = {n: at[f"rule: {n}"] for n in psi}, {n: at[n] for n in weights}
        steps = [{n: at[f"{GRADIENT}{k} {n}"] for n in weights} for k in range(STEPS)]
        return _updates(rule, own, start, rule.init(own, start), steps)

    def held(at: Params) -> list[Params]:
        with replayed(constants):
            return function(at)

    here = {f"rule: {n}": p for n, p in psi.items()} | grads | weights
    constants: list[Tensor] = []
    with recorded(constants):
        function(here)
    return Part("the update rule", lambda: held, here)


def _updates(rule: Rule, psi: Params, weights: Params, state: State, gradients: Sequence[Params]) -> list[Params]:
    updates: list[Params] = []
    for k, grads in enumerate(gradients):
        update, state = rule.update(psi, grads, state, weights, _step(k, weights))
        weights = trees.add(weights, update)
        updates.append(update)
    return updates


def _step(k: int, weights: Params) -> Step:
    like = trees.flatten(weights)[0]
    return Step(torch.tensor(k, device=like.device), like.new_ones(()))


def _equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(trees.flatten(a), trees.flatten(b), strict=True))
