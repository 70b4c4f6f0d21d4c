"""Schedule-free AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_fractions, check_numbers, check_positive
from metaoptim.core.types import Params, State, Step
from metaoptim.rules.adam import zero
from metaoptim.rules.roots import root


@dataclass(frozen=True)
class ScheduleFreeAdamW:
    """z ← z − η_k · (g / (√v + eps) + decay · y);  x ← (1−c) · x + c · z;  y = b1 · x + (1−b1) · z.

    The weights are y, where gradients are taken; the run is judged at the mean x of all z, which `read_out` returns. Here
    v ← b2·v + (1−b2)·g² as in Adam, η_k = lr · √(1 − b2^(k+1)) · min((k+1)/warmup, 1) and c = η_k² / Σ_(i≤k) η_i².

    What is kept of x and z is z − x, so that the state holds nothing of the weights; it is in float32 at least. The denominator
    is differentiated too, as in `AdamW`. For use by itself, or after a `Clip`: what scales its updates would break the mean.

    Source: Defazio and others 2024, https://arxiv.org/abs/2405.15682, algorithm 1, with the weights of their code.

    Args:
        lr: step size.
        b1: how near y is to the mean.
        b2: decay of the second moment.
        eps: small constant of the denominator.
        decay: weight decay at y, times the step size.
        warmup: steps in which the step size grows to lr; 0 for none.
    """

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    warmup: int = 0
    separable: ClassVar[bool] = True
    takes_step: ClassVar[bool] = True
    decays_weights: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_fractions(b1=self.b1, b2=self.b2)
        check_numbers(0, decay=self.decay)
        check_counts(0, warmup=self.warmup)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        t = zero(weights)
        gap, v = ({n: torch.zeros_like(w, dtype=t.dtype) for n, w in weights.items()} for _ in range(2))
        return {"gap": gap, "v": v, "sum": t, "t": t}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        t = state["t"] + 1
        size = (1 - self.b2**t).sqrt() * (t / max(1, self.warmup)).clamp(max=1)
        total = state["sum"] + size.square()
        c = size.square() / total
        updates, gaps, vs = {}, {}, {}
        for n, w in weights.items():
            g, gap = grads[n].to(t.dtype), state["gap"][n]
            vs[n] = self.b2 * state["v"][n] + (1 - self.b2) * g.square()
            ahead = gap - self.lr * size * (g / (root(vs[n]) + self.eps) + self.decay * w)  # the new z, from the old x
            gaps[n] = (1 - c) * ahead
            updates[n] = (c * ahead + (1 - self.b1) * (gaps[n] - gap)).to(w.dtype)
        return updates, {"gap": gaps, "v": vs, "sum": total, "t": t}

    def read_out(self, psi: Params, state: State, weights: Params) -> Params:
        """x, at which a run is judged."""
        return {n: w - ((1 - self.b1) * state["gap"][n]).to(w.dtype) for n, w in weights.items()}
