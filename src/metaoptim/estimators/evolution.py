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

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.gradients import autograd, held
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import (
    Claim,
    Clock,
    Estimate,
    Estimator,
    Info,
    Learner,
    MetaParams,
    State,
    Task,
)
from metaoptim.estimators.plain import Plain
from metaoptim.estimators.truncated import Running, Truncated, after, check_window, run_window
from metaoptim.estimators.unroll import Unroll
from metaoptim.nn.noise import normal

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
    """

    window: int
    sigma: float
    pairs: int = 1
    noise: Literal["truncated", "persistent", "reused"] = "persistent"
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
        start = learner.init(phi, task.support)
        states = trees.map_tensors(lambda x: x.expand(self.pairs, 2, *x.shape).clone(), start)
        none = trees.map_tensors(lambda x: x.new_zeros(self.pairs, *x.shape), phi)
        return Particles(states, none, torch.zeros_like(key))

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Particles, clock: Clock) -> Estimate:
        drawn, begins = self.draw(phi, clock.key), carry.k == 0
        if self.noise == "reused":
            drawn = trees.zip_tensors(lambda new, old: torch.where(begins, new, old), drawn, carry.perturbation)
        seen = drawn
        if self.noise == "persistent":
            seen = trees.zip_tensors(lambda new, sofar: torch.where(begins, new, sofar + new), drawn, carry.perturbation)

        def pair(eps: MetaParams, xi: MetaParams, states: State) -> tuple[Tensor, MetaParams, State, Info]:
            def run(sign: Tensor, state: State) -> tuple[Tensor, State, Info]:
                moved = trees.zip_tensors(lambda p, e: p + sign.to(p.dtype) * e, phi, eps)
                return run_window(learner, moved, task, Running(state, carry.k), self.window, held)

            signs = torch.tensor((1.0, -1.0), device=phi.device)
            losses, states, info = vmap(run, randomness="same")(signs, states)
            slope = (losses[0] - losses[1]) / (2 * self.sigma**2)
            loss, info = trees.map_tensors(lambda x: x.mean(0), (losses, info))
            return loss, trees.map_tensors(lambda x: slope * x, xi), states, info

        with autograd(False):
            loss, gradient, states, info = vmap(pair, randomness="different")(drawn, seen, carry.states)
        loss, gradient, info = trees.map_tensors(lambda x: x.mean(0), (loss, gradient, info))
        return Estimate(loss, gradient, Particles(states, seen, after(carry.k, self.window, learner, task)), info)

    def draw(self, phi: MetaParams, key: Tensor) -> MetaParams:
        """ε for every pair: a function of the key."""
        leaves = trees.flatten(phi)
        found = [self.sigma * normal(key, (self.pairs, *x.shape), x.dtype, APART + i) for i, x in enumerate(leaves)]
        perturbation: MetaParams = trees.unflatten(found, phi)
        return perturbation


def truncated_es(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Evolution strategies that see one window at a time: cheap, and biased where a run has several."""
    return EvolutionStrategy(window, sigma, pairs, "truncated")


def pes(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Persistent evolution strategies: unbiased, with a variance that grows with the windows of a run."""
    return EvolutionStrategy(window, sigma, pairs, "persistent")


def nres(window: int, sigma: float, pairs: int = 1) -> EvolutionStrategy:
    """Noise-reuse evolution strategies: unbiased; one perturbation for a whole run."""
    return EvolutionStrategy(window, sigma, pairs, "reused")
