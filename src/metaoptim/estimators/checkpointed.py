"""Reverse mode through an inner run of which only the states are kept: memory that hardly grows with the steps K.

The run is s_{k+1} = u(φ, s_k, g_k, l_k) with g_k = ∂f_k/∂x and l_k = f_k(x) of some scalar f_k(φ, s_k; x) at the weights x
that adapt. With s̄ for the cotangent of a state, one step is taken back either by running it again,

    steps:   (φ̄, s̄_k) += s̄_{k+1} · ∂u(φ, s_k, g_k(φ, s_k), l_k(φ, s_k)) / ∂(φ, s_k)

or, with g_k and l_k kept beside s_k as arguments of their own, forward over reverse, with no graph of a graph:

    mixed:   (φ̄, s̄_k, ḡ, l̄) += s̄_{k+1} · ∂u / ∂(φ, s_k, g, l)
             (φ̄, s̄_k) += d/dε ∂f_k(φ, s_k; x + ε ḡ) / ∂(φ, s_k) at ε = 0  +  l̄ ∂f_k(φ, s_k; x) / ∂(φ, s_k)

First order takes g_k and l_k for constants: mixed, without its second line. Annealed, a share of that line is left out.
Rematerialisation: Griewank and Walther 2000. Mixed mode: Kemaev et al. 2025, https://arxiv.org/abs/2505.00793.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad, jvp

from metaoptim.core import trees
from metaoptim.core.gradients import autograd, between, exact, held, pullback
from metaoptim.core.inner_loop import one_step
from metaoptim.core.objectives import Objective, Weight, counts, last, weights_of
from metaoptim.core.types import (
    Batch,
    Call,
    Carry,
    Claim,
    Clock,
    Estimate,
    Estimator,
    Info,
    Learner,
    Memory,
    MetaParams,
    Order,
    Params,
    State,
    Task,
    directly,
)
from metaoptim.estimators.plain import Plain

Given = tuple[Params, Tensor] | tuple[()]
"""(g_k, l_k) where they are kept; () where the step will be run again."""


@dataclass(frozen=True, repr=False)
class Checkpointed(Plain):
    """`Unroll`, computed from the states of the run.

    call: computes the parts of a run: the same function for all steps between the first and the last, as a rule.
    """

    first_order: Order = False
    objective: Objective = last
    judged_on: Literal["query", "support"] = "query"
    mixed: bool = False
    call: Call = directly
    memories: ClassVar[tuple[Memory, ...]] = ("steps", "mixed")

    @property
    def claim(self) -> Claim:
        return "first_order" if self.first_order else "exact"

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        return Checkpointed(self.first_order, self.objective, self.judged_on, memory == "mixed", call)

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        weights_of(self.objective, learner.steps, torch.tensor(0))

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        weights = weights_of(self.objective, learner.steps, clock.outer_step)
        batch = task.query if self.judged_on == "query" else task.support
        end = max(k for k, weight in enumerate(weights) if counts(weight))  # nothing after it has a cotangent
        numbers = [torch.tensor(k, device=clock.key.device) for k in range(end + 1)]
        states, kept = self.forward(learner, phi, task.support, numbers)
        # What makes one order of another is a tensor among the arguments, so that one graph serves all outer steps.
        share = [] if isinstance(self.first_order, bool) else [_scalar(self.first_order(clock.outer_step), phi)]
        total = phi
        cotangents: list[Tensor] = []
        losses: list[Tensor] = []
        report: Info = {}
        for k in range(end, -1, -1):
            before, given = (states.pop(), kept.pop()) if k else ((), ())
            judged = [_scalar(weights[k], phi)] if counts(weights[k]) else []
            back = Back(k == 0, k == end, self.mixed, self.first_order is True)
            args = (phi, task.support, batch, numbers[k], judged, before, given, cotangents, share)
            found, cotangents, loss, info = self.call(back, learner, *args)
            total = found if k == end else trees.plus(total, found)
            losses, report = losses + loss, report or info
        return Estimate(torch.stack(losses).sum(), total, carry, report)

    def forward(
        self, learner: Learner, phi: MetaParams, support: Batch, numbers: Sequence[Tensor]
    ) -> tuple[list[State], list[Given]]:
        """s_0 … s_{last−1}, and what is kept of the steps between them."""
        states: list[State] = []
        kept: list[Given] = []
        state = learner.init(phi, support)
        keeps = self.mixed or self.first_order is True
        for k in numbers[:-1]:
            states.append(state)
            given: Given = ()
            if keeps or len(states) < len(numbers) - 1:
                state, given = self.call(Forward(keeps), learner, phi, support, k, state)
            kept.append(given)
        return states, kept


@dataclass(frozen=True)
class Forward:
    """Step k: s_k to s_{k+1}, and (g_k, l_k) if they are kept."""

    keeps: bool

    def __call__(self, learner: Learner, phi: MetaParams, support: Batch, k: Tensor, state: State) -> tuple[State, Given]:
        seen: list[tuple[Params, Tensor]] = []

        def gradient(f: Any, x: Params) -> tuple[Params, Tensor]:
            seen.append(held(f, x))
            return seen[-1]

        after = one_step(learner, phi, state, support, k, gradient)
        return after, seen[0] if self.keeps and seen else ()


@dataclass(frozen=True)
class Back:
    """From s̄_k to s̄_{k−1}, with what φ̄ gets of it: the judgement of s_k, if it has a weight, and the step that led to s_k."""

    first: bool
    last: bool
    mixed: bool
    first_order: bool

    def __call__(
        self, learner: Learner, phi: MetaParams, support: Batch, batch: Batch, k: Tensor, weight: list[Tensor], before: State,
        given: Given, cotangents: list[Tensor], share: list[Tensor],
    ) -> tuple[MetaParams, list[Tensor], list[Tensor], Info]:  # fmt: skip
        """φ̄, s̄_{k−1}, and the judgement: its weighted loss, if it has a weight, and what it reports.

        share: of the derivatives of the inner gradient, what is left out, where that is annealed.
        """
        gradient = between(share[0]) if share else exact

        def segment(phi: MetaParams, values: list[Tensor], given: Given) -> tuple[tuple[list[Tensor], list[Tensor]], Info]:
            """From s_{k−1} (at first: from nothing) to what hangs on it: s_k, unless it is the last; its loss."""
            if self.first:
                state = learner.init(phi, support)
            elif given:
                state = learner.apply(phi, _filled(before, values), given[0], given[1], k - 1)
            else:
                state = one_step(learner, phi, _filled(before, values), support, k - 1, gradient)
            after = [] if self.last else _moving(state)
            if not weight:
                return (after, []), {}
            loss, info = learner.loss(phi, state, support, batch, k)
            return (after, [weight[0] * loss]), info

        def value(phi: MetaParams, values: list[Tensor], shift: Params) -> Tensor:
            """f_{k−1} at weights moved by the shift."""
            f, x = learner.inner(phi, _filled(before, values), support, k - 1)
            return f(trees.add(x, shift))[0]

        values = _moving(before)
        (_, judged), pull, info = pullback(segment, phi, values, given)
        found, back, of_given = pull((cotangents, [torch.ones_like(x) for x in judged]))
        if of_given and not self.first_order:
            _load_forward_mode(k.device)
            slope, of_loss = trees.map_tensors(lambda x: (1 - share[0]) * x, of_given) if share else of_given
            zero = {n: torch.zeros_like(x) for n, x in slope.items()}
            with autograd(False):
                moved: Any = jvp(lambda shift: grad(value, argnums=(0, 1))(phi, values, shift), (zero,), (slope,))
            there, along = moved
            more = trees.zip_tensors(lambda d, g: d + of_loss * g, along, there)
            found, back = trees.plus((found, back), more)
        return found, back, judged, info


def _moving(state: State) -> list[Tensor]:
    """The tensors of a state that can have a cotangent: not whole numbers."""
    return [x for x in trees.flatten(state) if x.is_floating_point() or x.is_complex()]


def _filled(state: State, values: Sequence[Tensor]) -> State:
    """The state with other values for what moves."""
    left = iter(values)
    return trees.map_tensors(lambda x: next(left) if x.is_floating_point() or x.is_complex() else x, state)


def _scalar(weight: Weight, phi: MetaParams) -> Tensor:
    like = trees.flatten(phi)[0]
    return weight.to(like.dtype) if isinstance(weight, Tensor) else torch.tensor(weight, dtype=like.dtype, device=like.device)


@cache
def _load_forward_mode(device: torch.device) -> None:
    """torch loads parts of its forward mode at the first use, and warns of its own code while it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        one = torch.ones(1, device=device)
        jvp(torch.sin, (one,), (one,))
