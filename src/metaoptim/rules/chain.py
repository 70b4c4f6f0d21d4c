"""Rules one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaoptim.core.types import Params, Rule, State, Step, read_out


@dataclass(frozen=True)
class Chain:
    """Rules in order, each fed with what the one before it returned; the ψ of the i-th is named `i.…`."""

    rules: tuple[Rule, ...]

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
