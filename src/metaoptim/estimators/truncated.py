"""Backpropagation through windows of a long inner run, whose state is carried from outer step to outer step.

    ∇φ (1/W) Σ_{i=1..W} loss(φ, s_{k+i}(φ), Q)          with s_k held constant, unless the run begins with it (k = 0)

Werbos 1990; Williams and Peng 1990. With W = K it is the unroll of the mean over the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_carried
from metaoptim.core.gradients import exact, outermost
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import (
    Claim,
    Clock,
    Estimate,
    Gradient,
    Info,
    Learner,
    MetaParams,
    State,
    Task,
)
from metaoptim.estimators.plain import Plain


class Running(NamedTuple):
    """An inner run in the middle: its state, and the steps that are done (0-dim int64); at 0 it begins."""

    state: State
    k: Tensor


@dataclass(frozen=True, repr=False)
class Truncated(Plain):
    """window: inner steps W per outer step. A task slot keeps its task for K / W outer steps, then begins anew."""

    window: int
    claim: ClassVar[Claim] = "truncated"

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_window(self.window, learner.steps)

    def lasts(self, learner: Learner) -> int:
        return learner.steps // self.window

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Running:
        return Running(check_carried(learner.init(phi, task.support)), torch.zeros_like(key))

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Running, clock: Clock) -> Estimate:
        def outer(phi: MetaParams) -> tuple[Tensor, tuple[State, Info]]:
            loss, state, info = run_window(learner, phi, task, carry, self.window, exact)
            return loss, (state, info)

        gradient, (loss, (state, info)) = outermost(outer, phi)
        state = trees.map_tensors(Tensor.detach, state)
        return Estimate(loss, gradient, Running(state, after(carry.k, self.window, learner, task)), info)


def check_window(window: int, steps: int) -> None:
    """A ValueError for a window that does not divide the run."""
    if window < 1 or steps < 1 or steps % window:
        raise ValueError(
            f"window={window}: it must be at least 1 and divide the inner steps, which are {steps}, so that a run ends with a "
            "window."
        )


def run_window(
    learner: Learner, phi: MetaParams, task: Task, running: Running, window: int, gradient: Gradient
) -> tuple[Tensor, State, Info]:
    """The mean loss over the states of a window, its last state, and what that reports.

    Where the run begins, its start is made of φ here, inside of what is differentiated or perturbed: made outside, a window
    would lose what the start owes to φ (for MAML's start, all of it).
    """
    begins = running.k == 0
    fresh = learner.init(phi, task.support)
    state = trees.zip_tensors(lambda new, old: torch.where(begins, new, old), fresh, running.state)
    states = inner_loop(learner, phi, task.support, gradient, window, (running.k, state))
    next(states)
    losses: list[Tensor] = []
    info: Info = {}
    for k, state in states:
        loss, info = learner.loss(phi, state, task.support, task.query, k)
        losses.append(loss)
    return torch.stack(losses).mean(), state, info


def after(k: Tensor, window: int, learner: Learner, task: Task) -> Tensor:
    """The steps that are done after a window: 0 at the end of the run, where a new one begins."""
    return (k + window) % learner.length(task.support)
