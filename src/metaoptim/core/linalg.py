"""Solvers of A x = b for a symmetric positive definite A, known by its products alone or of few rows; and a projection."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Params

Matvec = Callable[[Params], Params]


def cg(matvec: Matvec, b: Params, iterations: int) -> Params:
    """x with A x ≈ b by conjugate gradients from x = 0; exact after as many iterations as b has elements.

    Where A curves downwards along a search direction it is not positive definite, and x stays as it was before that direction;
    b itself where it was the first (Nocedal and Wright 2006, algorithm 7.1). Source: Hestenes and Stiefel 1952.
    """
    tiny = 1e-30  # keeps 0/0 at 0 once the residual is exactly zero, with no branch that vmap would refuse
    x = {n: v * 0.0 for n, v in b.items()}
    r, p, rr = b, b, trees.dot(b, b)
    convex = torch.ones_like(rr, dtype=torch.bool)
    for i in range(iterations):
        ap = matvec(p)
        curvature = trees.dot(p, ap)
        convex = convex & ~(curvature < 0)
        step = torch.where(convex, rr / (curvature + tiny), 0.0)
        x = {n: v + step * p[n] for n, v in x.items()}
        if i == 0:
            x = {n: torch.where(convex, v, b[n]) for n, v in x.items()}
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


def ridge(x: Tensor, y: Tensor, lam: Tensor | float) -> Tensor:
    """W (D, N), the minimum of ‖X W − Y‖² + λ ‖W‖², for X (M, D), Y (M, N) and λ > 0, by the smaller of two systems.

    M <= D: Xᵀ (X Xᵀ + λI)⁻¹ Y (Woodbury 1950); else (Xᵀ X + λI)⁻¹ Xᵀ Y.
    """
    kind = torch.promote_types(x.dtype, torch.float32)  # no solver takes half of it
    x, y = x.to(kind), y.to(kind)
    if x.shape[0] <= x.shape[1]:
        return x.mT @ regularised(x @ x.mT, y, lam)
    return regularised(x.mT @ x, x.mT @ y, lam)


def regularised(a: Tensor, b: Tensor, lam: Tensor | float) -> Tensor:
    """(A + λI)⁻¹ B by Cholesky's factors, for a symmetric A (M, M) without negative eigenvalues, B (M, N) and λ > 0.

    NaN where λ is so small that A + λI is not positive in floats of this size.
    """
    shifted = a + lam * torch.eye(len(a), dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)  # `cholesky` looks at the numbers, as no graph can
    return torch.cholesky_solve(b.to(factor.dtype), torch.where(failed == 0, factor, math.nan))


def onto_simplex(v: Tensor, total: float) -> Tensor:
    """The nearest points to rows v (…, N) of which no element is negative and all sum to `total` > 0.

    Source: Held, Wolfe and Crowder 1974.
    """
    largest = v.sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, v.shape[-1] + 1, device=v.device)
    threshold = ((largest - total) / counts).amax(-1, keepdim=True)
    return (v - threshold).clamp(min=0)


def crammer_singer(kernel: Tensor, y: Tensor, bound: float, iterations: int) -> Tensor:
    """α (M, N), the dual solution of a multi-class support vector machine, for its kernel K (M, M) and its classes Y (M, N).

    α ≈ argmin ½ Σ_n α_nᵀ (K + I) α_n − Σ_m α_m,y(m) with α_mn ≤ C [n = y(m)] and Σ_n α_mn = 0: each row of C·Y − α lies on a
    simplex. Steps of Nesterov's method for strongly convex functions, projected; all of them can be differentiated.

    Source: Crammer and Singer 2001; Nesterov 2004, section 2.2.
    """
    norm = (1 + kernel.square().sum()).sqrt()  # above the largest eigenvalue, and smooth
    momentum = 1 - 2 / ((1 + norm).sqrt() + 1)  # (√L − √μ) / (√L + √μ) with L = 1 + norm, μ = 1
    alpha = ahead = torch.zeros_like(y)
    for _ in range(iterations):
        slope = kernel @ ahead + ahead - y
        after = bound * y - onto_simplex(bound * y - ahead + slope / (1 + norm), bound)
        ahead, alpha = after + momentum * (after - alpha), after
    return alpha
