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

from metaoptim import trees
from metaoptim.types import Batch, Info, Learner, Meta, Params, State, Task


@dataclass(frozen=True)
class Backward:
    """One task's run, judged on `batch` with a weight for each of s_0 … s_K (one of them not 0)."""

    learner: Learner
    task: Task
    batch: Batch
    weights: Sequence[float]
    mixed: bool
    first_order: bool

    def __call__(self, meta: Meta) -> tuple[Meta, tuple[Tensor, Info]]:
        """∇φ of the weighted loss; that loss, and what the last judged state reports."""
        states, gradients = self.forward(meta)
        total: Meta | None = None
        slopes: list[Tensor] = []
        losses: list[Tensor] = []
        reports: list[Info] = []
        for k in range(self.last, -1, -1):
            before, given = (states.pop(), gradients.pop()) if k else ((), {})
            values = self.moving(before)
            differentiated: Any = vjp(partial(self.segment, k, before), meta, values, given, has_aux=True)
            (_, judged), pull, info = differentiated
            found, slopes, slope = pull((slopes, [torch.ones_like(x) for x in judged]))
            if slope and not self.first_order:
                more, further = self.along(slope, k, before, meta, values, given)
                found, slopes = trees.plus(found, more), trees.plus(slopes, further)
            total = found if total is None else trees.plus(total, found)
            losses, reports = losses + judged, reports + [info] * len(judged)
        return cast(Meta, total), (torch.stack(losses).sum(), reports[0])

    @property
    def last(self) -> int:
        """The last state that is judged: nothing after it has a slope."""
        return max(k for k, weight in enumerate(self.weights) if weight)

    def forward(self, meta: Meta) -> tuple[list[State], list[Params]]:
        """s_0 … s_{last−1}, and g_0 … g_{last−1} where they are kept ({} where a step will be run again)."""
        states: list[State] = []
        gradients: list[Params] = []
        state = self.learner.init(meta, self.task.support)
        for k in range(self.last):
            states.append(state)
            seen: list[Params] = []
            if self.mixed or self.first_order or k + 1 < self.last:
                state = self.learner.step(meta, state, self.task.support, k, partial(_kept, seen))
            gradients.append(_only(seen) if self.mixed or self.first_order else {})
        return states, gradients

    def segment(
        self, k: int, before: State, meta: Meta, values: list[Tensor], given: Params
    ) -> tuple[tuple[list[Tensor], list[Tensor]], Info]:
        """From s_{k−1} (k = 0: from nothing) to what hangs on it: s_k, unless it is the last; its loss, where it is judged."""
        if k:
            op = partial(_replayed, given) if given else grad
            state = self.learner.step(meta, self.filled(before, values), self.task.support, k - 1, op)
        else:
            state = self.learner.init(meta, self.task.support)
        after = [] if k == self.last else self.moving(state)
        if not self.weights[k]:
            return (after, []), {}
        loss, info = self.learner.loss(meta, state, self.batch, k)
        return (after, [self.weights[k] * loss]), info

    def along(
        self, slope: Params, k: int, before: State, meta: Meta, values: list[Tensor], given: Params
    ) -> tuple[Meta, list[Tensor]]:
        """d/dε of ∂f/∂(φ, s) with the adapted weights moved by ε·slope: the transposed derivative of g, times the slope."""

        def value(meta: Meta, values: list[Tensor], shift: Params) -> Tensor:
            seen: list[Tensor] = []
            op = partial(_evaluated, seen, given, shift)
            self.learner.step(meta, self.filled(before, values), self.task.support, k - 1, op)
            return seen[0]

        _load_forward_mode()
        zero = {n: torch.zeros_like(x) for n, x in slope.items()}
        moved: Any = jvp(lambda shift: grad(value, argnums=(0, 1))(meta, values, shift), (zero,), (slope,))[1]
        return cast(tuple[Meta, list[Tensor]], moved)

    def moving(self, state: State) -> list[Tensor]:
        """The tensors of a state that can have a slope: neither the task's own data nor whole numbers."""
        return [x for x in trees.flatten(state) if self.moves(x)]

    def filled(self, state: State, values: Sequence[Tensor]) -> Any:
        """The state with other values for what moves."""
        left = iter(values)
        return trees.map_tensors(lambda x: next(left) if self.moves(x) else x, state)

    def moves(self, x: Tensor) -> bool:
        return x.is_floating_point() and not any(x is own for own in self.task.support)


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
        seen.append(grad(f)(x))
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
