"""Hypergradient descent on the step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_numbers, check_positive
from metaoptim.core.types import Params, Rule, State, Step
from metaoptim.rules.adam import zero
from metaoptim.rules.adamw import AdamW
from metaoptim.rules.sgd import SGD


@dataclass(frozen=True)
class HypergradientDescent:
    """lr ← lr − hyper_lr · g·d;  d ← the update of a rule whose own step size is 1;  u = lr · d, in each step.

    g·d is the slope of the loss by the last step's lr. Nothing keeps lr positive. All of it is differentiated.

    Source: Baydin and others 2018, https://arxiv.org/abs/1703.04782, algorithms 4 (`sgd_hd`) and 6 (`adam_hd`).

    Args:
        rule: the rule whose updates are scaled, with a step size of 1.
        lr: step size at the start.
        hyper_lr: step size of the step size, in units of lr per squared gradient.
    """

    rule: Rule
    lr: float
    hyper_lr: float
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_numbers(0, hyper_lr=self.hyper_lr)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return self.rule.start(weights, generator)

    def init(self, psi: Params, weights: Params) -> State:
        last = {n: torch.zeros_like(w) for n, w in weights.items()}
        return {"lr": zero(weights) + self.lr, "last": last, "rule": self.rule.init(psi, weights)}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        lr = state["lr"] - self.hyper_lr * trees.dot(grads, state["last"])
        last, own = self.rule.update(psi, grads, state["rule"], weights, step)
        return {n: lr.to(d.dtype) * d for n, d in last.items()}, {"lr": lr, "last": last, "rule": own}


def sgd_hd(lr: float, hyper_lr: float) -> HypergradientDescent:
    """Gradient descent with hypergradient descent on its step size.

    Args:
        lr: step size at the start.
        hyper_lr: step size of the step size; the authors' code has 1e-6.
    """
    return HypergradientDescent(SGD(1.0), lr, hyper_lr)


def adam_hd(lr: float, hyper_lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> HypergradientDescent:
    """Adam with hypergradient descent on its step size; its denominator is differentiated too, as in `AdamW`.

    Args:
        lr: step size at the start.
        hyper_lr: step size of the step size; the authors' code has 1e-8.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: small constant of the denominator.
    """
    return HypergradientDescent(AdamW(1.0, b1, b2, eps, decay=0.0), lr, hyper_lr)
