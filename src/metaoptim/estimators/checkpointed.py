"""Reverse mode through an inner run of which only the states are kept: memory that hardly grows with the steps K.

The run is s_{k+1} = u(φ, s_k, g_k) with the inner gradient g_k = ∂f_k/∂x of some scalar f_k(φ, s_k; x) at the weights x that
adapt. With s̄ for the slope of the outer loss in a state, one step is taken back either by running it again,

    steps:   (φ̄, s̄_k) += s̄_{k+1} · ∂u(φ, s_k, g_k(φ, s_k)) / ∂(φ, s_k)

or, with g_k kept beside s_k as an argument of its own, forward over reverse, with no graph of a graph:

    mixed:   (φ̄, s̄_k, ḡ) += s̄_{k+1} · ∂u / ∂(φ, s_k, g);    (φ̄, s̄_k) += d/dε ∂f_k(φ, s_k; x + ε ḡ) / ∂(φ, s_k) at ε = 0

First order takes g_k for a constant: mixed, without its second term.
Mixed mode: Kemaev et al. 2025, https://arxiv.org/abs/2505.00793.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Info, Learner, Meta, Params, Run, State, Task


@dataclass(frozen=True)
class Backward:
    """One task's run, judged on `batch` with a weight for each of s_0 … s_K (one of them not 0).

    `run` computes the parts of it: the same function for all steps between the first and the last, as a rule.
    """

    learner: Learner
    task: Task
    batch: Batch
    weights: Sequence[float]
    mixed: bool
    first_order: bool
    run: Run

    def __call__(self, meta: Meta) -> tuple[Meta, tuple[Tensor, Info]]:
        """∇φ of the weighted loss; that loss, and what the last judged state reports."""
        last = max(k for k, weight in enumerate(self.weights) if weight)  # nothing after it has a slope
        states, kept = self.forward(meta, last)
        total: Meta | None = None
        slopes: list[Tensor] = []
        losses: list[Tensor] = []
        report: Info = {}
        for k in range(last, -1, -1):
            before, given = (states.pop(), kept.pop()) if k else ((), {})
            back = Back(k == 0, k == last, self.weights[k], self.mixed, self.first_order)
            args = (meta, self.task.support, self.batch, before, given, slopes)
            found, slopes, judged, info = self.run(back, self.learner, k, *args)
            total = found if total is None else trees.plus(total, found)
            losses, report = losses + judged, report or info
        return cast(Meta, total), (torch.stack(losses).sum(), report)

    def forward(self, meta: Meta, last: int) -> tuple[list[State], list[Params]]:
        """s_0 … s_{last−1}, and g_0 … g_{last−1} where they are kept ({} where a step will be run again)."""
        states: list[State] = []
        kept: list[Params] = []
        state = self.learner.init(meta, self.task.support)
        keeps = self.mixed or self.first_order
        for k in range(last):
            states.append(state)
            given: Params = {}
            if keeps or k + 1 < last:
                state, given = self.run(Forward(keeps), self.learner, k, meta, self.task.support, state)
            kept.append(given)
        return states, kept


@dataclass(frozen=True)
class Forward:
    """Step k: s_k to s_{k+1}, and g_k if it is kept."""

    keeps: bool

    def __call__(self, learner: Learner, k: int, meta: Meta, support: Batch, state: State) -> tuple[State, Params]:
        seen: list[Params] = []
        after = learner.step(meta, state, support, k, partial(_kept, seen))
        return after, _only(seen) if self.keeps else {}


@dataclass(frozen=True)
class Back:
    """From s̄_k to s̄_{k−1}, with what φ̄ gets of it: the judgement of s_k, if it has a weight, and the step that led to s_k."""

    first: bool
    last: bool
    weight: float
    mixed: bool
    first_order: bool

    def __call__(
        self, learner: Learner, k: int, meta: Meta, support: Batch, batch: Batch, before: State, given: Params,
        slopes: list[Tensor],
    ) -> tuple[Meta, list[Tensor], list[Tensor], Info]:  # fmt: skip
        """φ̄, s̄_{k−1}, and the judgement: its weighted loss, if it has one, and what it reports."""

        def segment(meta: Meta, values: list[Tensor], given: Params) -> tuple[tuple[list[Tensor], list[Tensor]], Info]:
            """From s_{k−1} (at first: from nothing) to what hangs on it: s_k, unless it is the last; its loss."""
            if self.first:
                state = learner.init(meta, support)
            else:
                op = partial(_replayed, given) if given else grad
                state = learner.step(meta, _filled(before, values, support), support, k - 1, op)
            after = [] if self.last else _moving(state, support)
            if not self.weight:
                return (after, []), {}
            loss, info = learner.loss(meta, state, batch, k)
            return (after, [self.weight * loss]), info

        def value(meta: Meta, values: list[Tensor], shift: Params) -> Tensor:
            """f_{k−1} at weights moved by the shift."""
            seen: list[Tensor] = []
            state = _filled(before, values, support)
            learner.step(meta, state, support, k - 1, partial(_evaluated, seen, given, shift))
            return seen[0]

        values = _moving(before, support)
        differentiated: Any = vjp(segment, meta, values, given, has_aux=True)
        (_, judged), pull, info = differentiated
        cotangents = (slopes, [torch.ones_like(x) for x in judged])
        found, slopes, slope = pull(cotangents, retain_graph=False, create_graph=False)
        if slope and not self.first_order:  # d/dε of ∂f/∂(φ, s) at x + ε·slope: the transposed derivative of g, times the slope
            _load_forward_mode()
            zero = {n: torch.zeros_like(x) for n, x in slope.items()}
            moved: Any = jvp(lambda shift: grad(value, argnums=(0, 1))(meta, values, shift), (zero,), (slope,))[1]
            found, slopes = trees.plus(found, moved[0]), trees.plus(slopes, moved[1])
        return found, slopes, judged, info


def _moving(state: State, support: Batch) -> list[Tensor]:
    """The tensors of a state that can have a slope: neither the task's own data nor whole numbers."""
    return [x for x in trees.flatten(state) if _moves(x, support)]


def _filled(state: State, values: Sequence[Tensor], support: Batch) -> State:
    """The state with other values for what moves."""
    left = iter(values)
    return trees.map_tensors(lambda x: next(left) if _moves(x, support) else x, state)


def _moves(x: Tensor, support: Batch) -> bool:
    return x.is_floating_point() and not any(x is own for own in support)


@cache
def _load_forward_mode() -> None:
    """torch loads parts of its forward mode at the first use, and warns of its own code while it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


Gradient = Callable[[Params], Params]


def _kept(seen: list[Params], f: Callable[[Params], Tensor]) -> Gradient:
    """A GradOp that takes gradients and keeps them."""

    def gradient(x: Params) -> Params:
        seen.append(gradients.outermost(f)(x))
        return seen[-1]

    return gradient


def _replayed(given: Params, f: Callable[[Params], Tensor]) -> Gradient:
    """A GradOp that returns what it was given, whatever the function."""
    return lambda x: given


def _evaluated(seen: list[Tensor], given: Params, shift: Params, f: Callable[[Params], Tensor]) -> Gradient:
    """A GradOp that keeps the value of the function at shifted weights, and returns what it was given."""

    def gradient(x: Params) -> Params:
        seen.append(f(trees.add(x, shift)))
        return given

    return gradient


def _only(seen: list[Params]) -> Params:
    if len(seen) > 1:
        raise ValueError(
            f'this learner takes {len(seen)} gradients in one inner step; memory="mixed" and first order with memory="steps" '
            'know one: use memory="graph".'
        )
    return seen[0] if seen else {}
