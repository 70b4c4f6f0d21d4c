"""ALFA: adaptive learning of hyperparameters for fast adaptation.

    θ_(l,k+1) = (1 − b_l B_(l,k)) θ_(l,k) − a_l A_(l,k) ∇_(θ_l) L_i(θ_k; S_i)
    (a, b) = g_ψ(means of θ_l and of ∇_(θ_l), for all l)          in every step anew
    (θ, A, B, ψ) ← (θ, A, B, ψ) − β ∇ mean_i L_i(θ_K; Q_i)

Paper: Baik, Choi, Choi, Kim and Lee 2020, https://arxiv.org/abs/2011.00209, section 3.

Deviations: the gradient passes through the inputs of g, which the published code takes for constants. Its output starts near
a = b = 1 (biases of 1), so that training starts near MAML with weight decay; in the code it starts anywhere. As in the code, l
counts weight tensors and not layers; its tables A and B have one more row than steps, which nothing uses. The variant that
starts from random weights is left out. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_numbers, check_positive
from metaoptim.core.types import MetaOptimizer, Normalisation, Params, State, Step
from metaoptim.rules.layer_step_sizes import at


@dataclass(frozen=True)
class Generated:
    """Step sizes and decays made by a network 2L → 2L → 2L, for L weight tensors, and by tables of one for each and every step.

    ψ: {hidden.weight, hidden.bias, out.weight, out.bias, size.NAME: A (K), decay.NAME: B (K)}; past K the last row goes on.
    """

    lr: float
    decay: float
    steps: int
    takes_step: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_numbers(0, decay=self.decay)
        check_counts(steps=self.steps)

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        like, n = next(iter(weights.values())), 2 * len(weights)

        def draw(*shape: int) -> Tensor:  # where the generator is, so that every device starts from the same numbers
            u = torch.rand(shape, dtype=like.dtype, generator=generator, device=generator.device)
            return ((2 * u - 1) / math.sqrt(n)).to(like.device)

        network = {"hidden.weight": draw(n, n), "hidden.bias": draw(n), "out.weight": draw(n, n), "out.bias": like.new_ones(n)}
        tables = {"size": self.lr, "decay": self.lr * self.decay}
        return network | {f"{t}.{n}": w.new_full((self.steps,), x) for t, x in tables.items() for n, w in weights.items()}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        names = sorted(grads)  # the inputs' places must not depend on the order of a dictionary
        means = torch.stack([x[n].mean() for x in (weights, grads) for n in names])
        hidden = (psi["hidden.weight"] @ means + psi["hidden.bias"]).relu()
        sizes, decays = (psi["out.weight"] @ hidden + psi["out.bias"]).chunk(2)

        def moved(n: str, a: Tensor, b: Tensor) -> Tensor:
            return -b * at(psi[f"decay.{n}"], step.k) * weights[n] - a * at(psi[f"size.{n}"], step.k) * grads[n]

        return {n: moved(n, a, b) for n, a, b in zip(names, sizes.unbind(), decays.unbind(), strict=True)}, state


def alfa(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    decay: float = 5e-4,
    steps: int = 5,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start, and a network that makes step sizes and weight decays of the state of the run.

    Args:
        lr: every entry of the step sizes A at the start, on the mean loss.
        decay: every entry of the weight decays B at the start, as a multiple of `lr`; above 0, or b gets no gradient.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    return compose(net, loss, rule=Generated(lr, decay, steps), steps=steps, normalisation=normalisation, name="alfa")
