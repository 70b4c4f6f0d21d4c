"""Solvers of A x = b for a symmetric positive definite A that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable

from metaoptim.core import trees
from metaoptim.core.types import Params

Matvec = Callable[[Params], Params]


def cg(matvec: Matvec, b: Params, iterations: int) -> Params:
    """x with A x ≈ b by conjugate gradients from x = 0; exact after as many iterations as b has elements.

    Source: Hestenes and Stiefel 1952.
    """
    tiny = 1e-30  # keeps 0/0 at 0 once the residual is exactly zero, with no branch that vmap would refuse
    x = {n: v * 0.0 for n, v in b.items()}
    r, p, rr = b, b, trees.dot(b, b)
    for _ in range(iterations):
        ap = matvec(p)
        step = rr / (trees.dot(p, ap) + tiny)
        x = {n: v + step * p[n] for n, v in x.items()}
        r = {n: v - step * ap[n] for n, v in r.items()}
        new = trees.dot(r, r)
        p = {n: v + new / (rr + tiny) * p[n] for n, v in r.items()}
        rr = new
    return x


def neumann(matvec: Matvec, b: Params, iterations: int, scale: float = 1.0) -> Params:
    """x ≈ scale · Σ_{i ≤ iterations} (I − scale·A)^i b, which tends to A⁻¹ b where ‖I − scale·A‖ < 1."""
    x = term = {n: scale * v for n, v in b.items()}
    for _ in range(iterations):
        term = trees.add(term, matvec(term), -scale)
        x = trees.add(x, term)
    return x
