"""Rules one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import takes_step
from metaoptim.core.types import Params, Rule, State, Step, read_out


@dataclass(frozen=True)
class Chain:
    """Rules in order, each fed with what the one before it returned; the ψ of the i-th is named `i.…`."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        steps = [rule for rule in self.rules if takes_step(rule)]
        if not self.rules or len(steps) > 1:
            found = f"{brief(steps[0])} and {brief(steps[1])} both take one" if steps else "it is empty"
            raise ValueError(
                f"a chain needs one rule that takes the step, such as SGD or Adam, and {found}: others in it may change "
                "gradients ahead of it, as Clip does, or scale its updates, as Schedule does."
            )

    @property
    def takes_step(self) -> bool | None:
        kinds = {takes_step(rule) for rule in self.rules}
        return True if True in kinds else None if None in kinds else False

    @property
    def separable(self) -> bool:
        return all(getattr(rule, "separable", False) for rule in self.rules)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        parts = enumerate(rule.start(weights, generator) for rule in self.rules)
        return {f"{i}.{n}": p for i, own in parts for n, p in own.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return tuple(rule.init(_own(psi, i), weights) for i, rule in enumerate(self.rules))

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        after = []
        for i, rule in enumerate(self.rules):
            grads, new = rule.update(_own(psi, i), grads, state[i], weights, step)
            after.append(new)
        return grads, tuple(after)

    def read_out(self, psi: Params, state: State, weights: Params) -> Params:
        for i, rule in enumerate(self.rules):
            weights = read_out(rule, _own(psi, i), state[i], weights)
        return weights


def chain(*rules: Rule) -> Chain:
    """Rules in order, each fed with what the one before it returned."""
    return Chain(rules)


def _own(psi: Params, i: int) -> Params:
    return {n.removeprefix(f"{i}."): p for n, p in psi.items() if n.startswith(f"{i}.")}
