"""A running mean of the weights, at which a run is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_fractions, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.adam import zero


@dataclass(frozen=True)
class Average:
    """x ← d_k · x + (1−d_k) · w, d_k = min(d, (k+1)/(k+10)), for use after a rule: `chain(Adam(0.01), Average(0.9))`.

    The weights w move as the rule before it says; the run is judged at their mean x, which `read_out` returns, and which has
    less of the noise that minibatches leave. d is learnt: ψ is {logit}, log(d / (1−d)). What is kept of x is x − w, in float32
    at least; so the steps have to be those that this rule sees.

    Source: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046, with exponential weights in place of equal ones.

    Args:
        decay: d at the start.
    """

    decay: float = 0.9
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = False

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(decay=self.decay)
        check_fractions(decay=self.decay)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {"logit": torch.full_like(zero(weights), math.log(self.decay / (1 - self.decay)))}

    def init(self, psi: Params, weights: Params) -> State:
        t = zero(weights)
        return {"gap": {n: torch.zeros_like(w, dtype=t.dtype) for n, w in weights.items()}, "t": t}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        t = state["t"] + 1
        d = torch.minimum(psi["logit"].to(t.dtype).sigmoid(), t / (t + 9))
        return grads, {"gap": {n: d * (gap - grads[n]) for n, gap in state["gap"].items()}, "t": t}

    def read_out(self, psi: Params, state: State, weights: Params) -> Params:
        """x, at which a run is judged."""
        return {n: w + state["gap"][n].to(w.dtype) for n, w in weights.items()}
