"""∇φ at the end of the inner run by the implicit function theorem, without a word about the way there.

With f the inner objective, its prox included, x* where it is least, and L the outer loss,

    ∇φ L = ∂L/∂φ − (∂²f/∂φ∂x)ᵀ v          where (∇²f + damping · I) v = ∂L/∂x at x*

For f = L_S + (λ/2)‖x − θ‖² that is λ v = (I + ∇²L_S/λ)⁻¹ ∂L/∂x. Rajeswaran, Finn, Kakade and Levine 2019,
https://arxiv.org/abs/1909.04630; the Neumann series: Lorraine, Vicol and Duvenaud 2020, https://arxiv.org/abs/1911.02590.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.func import grad, vjp

from metaoptim.core import linalg, trees
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import (
    Carry,
    Claim,
    Clock,
    Estimate,
    Learner,
    Loss,
    MetaParams,
    Params,
    State,
    Task,
)
from metaoptim.estimators.plain import Plain


@dataclass(frozen=True, repr=False)
class Implicit(Plain):
    """Exact at the minimum of the inner objective: the run must come close to it, which a prox helps.

    Args:
        solver: "cg" (conjugate gradients), or "neumann": v = scale · Σ_i (I − scale · A)^i ∂L/∂x, for ‖I − scale · A‖ < 1.
        iterations: of the solver.
        damping: added to the diagonal of the Hessian.
        scale: of the Neumann series.
    """

    solver: Literal["cg", "neumann"] = "cg"
    iterations: int = 5
    damping: float = 0.0
    scale: float = 0.1
    claim: ClassVar[Claim] = "implicit"

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        if self.solver not in ("cg", "neumann"):
            raise ValueError(f"solver {self.solver!r} is unknown: choose cg or neumann.")
        if self.iterations < 0 or self.damping < 0:
            raise ValueError(f"iterations={self.iterations}, damping={self.damping}: neither may be negative.")
        if learnt.rule:
            raise ValueError(
                f"the minimum of the inner objective does not depend on the rule's own parameters ({min(learnt.rule)}, …), "
                "so that an implicit gradient can't train them; use Unroll, or a rule without any, such as SGD."
            )

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
        *_, (k, state) = inner_loop(learner, phi, task.support, held)
        judged: Any = vjp(lambda p, s: learner.loss(p, s, task.support, task.query, k), phi, state, has_aux=True)
        loss, pull, info = judged
        direct, slopes = pull(torch.ones_like(loss))
        x = learner.inner(phi, state, task.support, k)[1]
        v = self.solve(learner, phi, state, task, k, _part(x, state, slopes))

        def slope(phi: MetaParams) -> Params:
            return _slope(learner.inner(phi, state, task.support, k)[0], x)

        crossed: Any = vjp(slope, phi)
        cross = crossed[1](v)[0]
        return Estimate(loss, trees.zip_tensors(torch.sub, direct, cross), carry, info)

    def solve(self, learner: Learner, phi: MetaParams, state: State, task: Task, k: Tensor, b: Params) -> Params:
        """v with (∇²f + damping · I) v = b."""
        f, x = learner.inner(phi, state, task.support, k)
        # Reverse over reverse, linearised once: some of torch's functions have no forward mode.
        linearised: Any = vjp(partial(_slope, f), x)

        def hessian(v: Params) -> Params:
            return trees.add(linearised[1](v)[0], v, self.damping)

        if self.solver == "cg":
            return linalg.cg(hessian, b, self.iterations)
        return linalg.neumann(hessian, b, self.iterations, self.scale)


def _slope(f: Loss, x: Params) -> Params:
    grads, _ = grad(f, has_aux=True)(x)
    return cast(Params, grads)


def _part(x: Params, state: State, slopes: State) -> Params:
    """The slopes of those tensors of a state that are the point x."""
    places = {id(leaf): slope for leaf, slope in zip(trees.flatten(state), trees.flatten(slopes), strict=True)}
    if any(id(p) not in places for p in x.values()):
        raise ValueError(
            "this learner's inner objective is not taken at tensors of its state; Implicit needs that: use Unroll."
        )
    return {n: places[id(p)] for n, p in x.items()}
