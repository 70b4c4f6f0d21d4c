"""∇φ from perturbed inner runs alone, with no derivative of them: evolution strategies over windows of a long run.

With antithetic pairs φ ± ε, ε ~ N(0, σ²I), and L± the mean loss over a window of the pair's runs, whose states are carried,

    ĝ = mean over pairs of (L⁺ − L⁻) / (2σ²) · ξ

    truncated ES:  ε drawn for each window, ξ = ε            biased: a window doesn't see what earlier ones did to its start
    PES:           ε drawn for each window, ξ = Σ of the run's ε so far                      unbiased
    NRES:          ε drawn for each run and used again in all its windows, ξ = ε             unbiased

With one window for the whole run all three are full-horizon ES. PES: Vicol, Metz and Sohl-Dickstein 2021,
https://arxiv.org/abs/2112.13835; NRES: Li, Harrison, Sohl-Dickstein, Smith and Metz 2023, https://arxiv.org/abs/2304.12180.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.checks import check_carried
from metaoptim.core.gradients import autograd, held
from metaoptim.core.inner_loop import one_step
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import (
    Call,
    Claim,
    Clock,
    Estimate,
    Estimator,
    Info,
    Learner,
    Memory,
    MetaParams,
    State,
    Task,
    directly,
)
from metaoptim.estimators.plain import Plain
from metaoptim.estimators.truncated import Truncated, after, check_window
from metaoptim.estimators.unroll import Unroll
from metaoptim.nn.noise import normals

APART = 1 << 30  # stages of noise that no inner step has


class Particles(NamedTuple):
    """P pairs in the middle of their runs: the states of both signs (leading axes P, 2), ξ like φ (leading axis P), and k."""

    states: State
    perturbation: MetaParams
    k: Tensor


@dataclass(frozen=True, repr=False)
class EvolutionStrategy(Plain):
    """Made by `truncated_es`, `pes` and `nres`.

    Args:
        window: inner steps W per outer step; a task slot keeps its task for K / W outer steps.
        sigma: σ, the size of the perturbation of every learnt number.
        pairs: P antithetic pairs for each task, side by side under vmap.
        noise: how ε is drawn, and what ξ is.
        call: computes start, step and end of a window: the same function for all steps.
    """

    window: int
    sigma: float
    pairs: int = 1
    noise: Literal["truncated", "persistent", "reused"] = "persistent"
    call: Call = field(default=directly, repr=False, compare=False)
    claim: ClassVar[Claim] = "stochastic"

    @property
    def target(self) -> Estimator:
        """The estimator whose gradient, averaged over a run, is the mean of this one's as σ goes to 0."""
        return Truncated(self.window) if self.noise == "truncated" else Unroll(objective=trajectory_mean)

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        check_window(self.window, learner.steps)
        if not self.sigma > 0 or self.pairs < 1:
            raise ValueError(f"sigma={self.sigma}, pairs={self.pairs}: sigma must be positive, pairs at least 1.")

    def lasts(self, learner: Learner) -> int:
        return learner.steps // self.window

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Particles:
        start = check_carried(learner.init(phi, task.support))
        states = trees.map_tensors(lambda x: x.expand(self.pairs, 2, *x.shape).clone(), start)
        none = trees.map_tensors(lambda x: x.new_zeros(self.pairs, *x.shape), phi)
        return Particles(states, none, torch.zeros_like(key))

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        return replace(self, call=call)

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Particles, clock: Clock) -> Estimate:
        moved, seen, states = self.call(self._begin, learner, phi, task, carry, clock.key)
        losses: list[Tensor] = []
        info: Info = {}
        for i in range(self.window):
            states, loss, info = self.call(self._step, learner, moved, task, states, carry.k + i)
            losses.append(loss)
        loss, gradient, info, k = self.call(self._end, learner, losses, seen, info, carry.k, task)
        return Estimate(loss, gradient, Particles(states, seen, k), info)

    def _begin(
        self, learner: Learner, phi: MetaParams, task: Task, carry: Particles, key: Tensor
    ) -> tuple[MetaParams, MetaParams, State]:
        """φ ± ε (P, 2, …), ξ (P, …) and the states (P, 2, …) that the window starts from."""
        drawn, begins = self.draw(phi, key), carry.k == 0
        if self.noise == "reused":
            drawn = trees.zip_tensors(lambda new, old: torch.where(begins, new, old), drawn, carry.perturbation)
        seen = drawn
        if self.noise == "persistent":
            seen = trees.zip_tensors(lambda new, sofar: torch.where(begins, new, sofar + new), drawn, carry.perturbation)
        moved = trees.zip_tensors(lambda p, e: torch.stack((p + e, p - e), 1), phi, drawn)
        fresh = _of_all(lambda own: learner.init(own, task.support))(moved)
        return moved, seen, trees.zip_tensors(lambda new, old: torch.where(begins, new, old), fresh, carry.states)

    def _step(self, learner: Learner, moved: MetaParams, task: Task, states: State, k: Tensor) -> tuple[State, Tensor, Info]:
        """s_{k+1} of all runs, their losses (P, 2), and what those report."""

        def run(own: MetaParams, state: State) -> tuple[State, Tensor, Info]:
            after = one_step(learner, own, state, task.support, k, held)
            return after, *learner.loss(own, after, task.support, task.query, k + 1)

        with autograd(False):
            found: tuple[State, Tensor, Info] = _of_all(run)(moved, states)
        return found

    def _end(
        self, learner: Learner, losses: list[Tensor], seen: MetaParams, info: Info, k: Tensor, task: Task
    ) -> tuple[Tensor, MetaParams, Info, Tensor]:
        """The loss, the gradient, what is reported, and the steps that are done."""
        mean = torch.stack(losses).mean(0)
        slopes = (mean[:, 0] - mean[:, 1]) / (2 * self.sigma**2)
        gradient = trees.map_tensors(lambda x: (slopes.view(-1, *[1] * (x.ndim - 1)) * x).mean(0), seen)
        return mean.mean(), gradient, trees.map_tensors(lambda x: x.mean((0, 1)), info), after(k, self.window, learner, task)

    def draw(self, phi: MetaParams, key: Tensor) -> MetaParams:
        """ε for every pair: a function of the key."""
        leaves = trees.flatten(phi)
        kind = reduce(torch.promote_types, (x.dtype for x in leaves), torch.float32)
        drawn = normals(key, [(self.pairs, *x.shape) for x in leaves], kind, APART)
        found = [self.sigma * z.to(x.dtype) for z, x in zip(drawn, leaves, strict=True)]
        perturbation: MetaParams = trees.unflatten(found, phi)
        return perturbation


def _of_all(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function mapped over pairs, and over the two signs of each, which draw the same numbers."""
    return vmap(vmap(run, randomness="same"), randomness="different")


def truncated_es(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Evolution strategies that see one window at a time: cheap, and biased where a run has several."""
    return EvolutionStrategy(window, sigma, pairs, "truncated")


def pes(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Persistent evolution strategies: unbiased, with a variance that grows with the windows of a run."""
    return EvolutionStrategy(window, sigma, pairs, "persistent")


def nres(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Noise-reuse evolution strategies: unbiased; one perturbation for a whole run."""
    return EvolutionStrategy(window, sigma, pairs, "reused")
