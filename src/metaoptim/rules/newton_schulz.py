"""The nearest matrix with orthonormal rows or columns, nearly, by products alone."""

from __future__ import annotations

from torch import Tensor

from metaoptim.rules.roots import root

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients under which small singular values grow fast; all end near 1, and not at it."""


def orthogonalise(matrix: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC) -> Tensor:
    """U Vᵀ, nearly, of matrices (…, A, B) = U S Vᵀ: X ← a X + (b X Xᵀ + c (X Xᵀ)²) X from X = M / (‖M‖ + 1e-8).

    A matrix of zeros stays one. Newton–Schulz's iteration with the quintic of Jordan et al. 2024 (Muon).
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (root(x.square().sum((-2, -1), keepdim=True)) + 1e-8)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
