"""Gradients of tasks that conflict, put together by TorchJD (https://torchjd.org).

    ⟨g_s, g_t⟩ < 0          a step along one task's gradient raises another task's loss

All are on the scale of the mean: where no two gradients conflict, `UPGrad` and `PCGrad` are the mean, so that an outer step
size means the same for each. PCGrad's paper and TorchJD add up the T gradients that are left; here they are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaoptim.core.checks import check_counts, check_positive

PATIENCE = 100  # steps of the solver for each task, which needs a few


@dataclass(frozen=True)
class UPGrad:
    """The mean of the gradients, each projected to where no task's loss rises.

    Quinton and Rey 2024, https://arxiv.org/abs/2406.16232, section 3. The projections are T quadratic programs, which scipy
    solves as non-negative least squares.

    Args:
        regularisation: added to the diagonal of the inner products, of which the trace is 1, as TorchJD does. TorchJD takes
            gradients whose squared lengths add up to less than 1e-4 for 0, and gives the mean; here no length is too small.
    """

    regularisation: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(regularisation=self.regularisation)

    def weigh(self, gram: Tensor, key: int) -> Tensor:
        return _weights(_needed("torchjd.aggregation").UPGradWeighting(projector=self.project), gram)

    def project(self, preferences: Tensor, gram: Tensor) -> Tensor:
        """The weights (T, T) of the projections of g = Jᵀu for each row u: argmin_v vᵀGv subject to v >= u."""
        nnls = _needed("scipy.optimize").nnls
        u, g = _array(preferences), _array(gram)
        trace = float(np.trace(g))
        if trace == 0:
            return preferences
        root = np.linalg.cholesky(g / trace + self.regularisation * np.eye(len(g)))  # vᵀGv = |Lᵀv|², and v = u + w, w >= 0
        found = np.stack([row + nnls(root.T, -root.T @ row, maxiter=PATIENCE * len(g))[0] for row in u])
        return torch.as_tensor(found, dtype=gram.dtype, device=gram.device)


@dataclass(frozen=True)
class PCGrad:
    """The mean of the gradients, each of which loses its part against every other one that it conflicts with, in random order.

    Yu, Kumar, Gupta, Levine, Hausman and Finn 2020, https://arxiv.org/abs/2001.06782, algorithm 1. The order is a function of
    (seed, outer step).
    """

    def weigh(self, gram: Tensor, key: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            return _weights(_needed("torchjd.aggregation").PCGradWeighting(), gram) / len(gram)


@dataclass(frozen=True)
class MGDA:
    """The shortest convex combination of the gradients, which lowers every task's loss or is 0.

    Désidéri 2012, https://doi.org/10.1016/j.crma.2012.03.014; Sener and Koltun 2018, https://arxiv.org/abs/1810.04650,
    algorithm 2. A task whose gradient is short, as one that is nearly solved, gets most of the weight.

    Args:
        epsilon: length of a step of the Frank-Wolfe solver at which it stops.
        iterations: its steps at the most.
    """

    epsilon: float = 1e-3
    iterations: int = 100

    def __post_init__(self) -> None:
        check_counts(iterations=self.iterations)
        check_positive(epsilon=self.epsilon)

    def weigh(self, gram: Tensor, key: int) -> Tensor:
        weighting = _needed("torchjd.aggregation").MGDAWeighting(epsilon=self.epsilon, max_iters=self.iterations)
        return _weights(weighting, gram)


def _needed(module: str) -> Any:
    """A module that is optional; a ValueError where it isn't installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"a reduction that heeds conflicts between tasks needs {module.partition('.')[0]}, which isn't installed: "
            "pip install 'metaoptim[multitask]', or choose the reduction mean."
        ) from error


def _weights(weighting: Any, gram: Tensor) -> Tensor:
    """The weights (T); NaN where a gradient is not finite, of which training then tells."""
    if not gram.isfinite().all():
        return torch.full_like(gram[0], torch.nan)
    with torch.no_grad():
        weights: Tensor = weighting(gram)
    return weights


def _array(x: Tensor) -> NDArray[np.float64]:
    return x.numpy(force=True).astype(np.float64)
