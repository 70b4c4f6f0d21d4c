"""Sine wave regression, the toy problem of the MAML paper (Finn et al. 2017, arXiv 1703.03400, §5.1)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from metaoptim.core.checks import check_counts, check_memory
from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import check_split, choose, uniforms

DRAWN = 32  # bytes that drawing one point takes


def sinusoid(
    shots: int = 10,
    queries: int = 10,
    phase: Literal["pi", "2pi"] = "pi",
    train_shots: int | None = None,
    grid: int | None = None,
) -> Sinusoid:
    """Sine waves y = A sin(x − φ), A ~ U[0.1, 5], φ ~ U[0, π], x ~ U[−5, 5]: x, y [T, S, 1], [T, Q, 1].

    Mean squared errors without adaptation: the zero function has 4.25. The best function that doesn't know the
    task is −1.623 cos x, with 3.00, for phases up to π, and zero itself, with 4.25, for phases up to 2π. A
    meta-learner has to beat these before adaptation deserves any credit.

    Every task is drawn afresh, so the splits differ only in their random streams. Reptile's variant (Nichol,
    Achiam and Schulman 2018) trains on all of 50 fixed points and is evaluated on them: `sinusoid(shots=10,
    queries=50, phase="2pi", train_shots=50, grid=50)`.

    Args:
        shots: Support points per task.
        queries: Query points per task.
        phase: The largest phase: `pi` as in the MAML paper, or `2pi`.
        train_shots: Support points per task in the split `train`, if different.
        grid: How many evenly spaced points of [−5, 5] support and query are each drawn from, without replacement.
    """
    return Sinusoid(shots, queries, phase, train_shots, grid)


@dataclass(frozen=True)
class Sinusoid:
    """The family that `sinusoid` builds; its fields are that function's arguments."""

    shots: int
    queries: int
    phase: Literal["pi", "2pi"]
    train_shots: int | None
    grid: int | None

    def __post_init__(self) -> None:
        check_counts(shots=self.shots, queries=self.queries, train_shots=self.train_shots)
        if self.phase not in ("pi", "2pi"):
            raise ValueError(f"phase is {self.phase!r}; it must be 'pi' or '2pi'.")
        check_counts(2, grid=self.grid)
        most = max(self.shots, self.queries, self.train_shots or 1)
        check_memory(DRAWN * 2 * max(most, self.grid or 1), "one task of so many points")
        if self.grid is not None and self.grid < most:
            raise ValueError(f"A grid of {self.grid} points can't give {most} different ones; pass a larger grid or None.")

    def __repr__(self) -> str:
        standard = sinusoid()
        differs = {name: value for name, value in asdict(self).items() if value != getattr(standard, name)}
        return f"sinusoid({', '.join(f'{name}={value!r}' for name, value in differs.items())})"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "test")

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        check_split(split, self.splits)
        shots = self.train_shots if split == "train" and self.train_shots is not None else self.shots
        widths = (1, 1, self.grid or shots, self.grid or self.queries)
        u = uniforms(seed, f"episodes/{split}", start, count, sum(widths))
        of_amplitude, of_phase, of_support, of_query = np.split(u, np.cumsum(widths)[:-1], axis=1)

        def batch(keys: NDArray[np.float64], n: int) -> Batch:
            x = 10 * keys - 5 if self.grid is None else np.linspace(-5, 5, self.grid)[choose(keys, n)]
            return self._waves(of_amplitude, of_phase, x)

        return Task(batch(of_support, shots), batch(of_query, self.queries))

    def training_tasks(self) -> tuple[None, None]:
        """As many waves as are wanted: the first ones of a stream of the seed."""
        return None, None

    def of_training_tasks(self, which: NDArray[np.intp], rows: int, *, seed: int, start: int) -> Batch:
        """Points of the waves with these numbers: x, y [T, rows, 1]."""
        waves = uniforms(seed, "training tasks/waves", 0, int(which.max()) + 1, 2)[which]
        u = uniforms(seed, "training tasks/points", start, len(which), rows)
        x = 10 * u - 5 if self.grid is None else np.linspace(-5, 5, self.grid)[(u * self.grid).astype(np.intp)]
        return self._waves(waves[:, :1], waves[:, 1:], x)

    def _waves(self, of_amplitude: NDArray[np.float64], of_phase: NDArray[np.float64], x: NDArray[np.float64]) -> Batch:
        """x and y [T, rows, 1] of waves whose amplitudes and phases are drawn, [T, 1] in 0 … 1."""
        amplitude, largest = 0.1 + 4.9 * of_amplitude, {"pi": math.pi, "2pi": 2 * math.pi}[self.phase]
        pair = np.stack([x, amplitude * np.sin(x - largest * of_phase)]).astype(np.float32)
        return torch.from_numpy(pair[0, :, :, None]), torch.from_numpy(pair[1, :, :, None])

    def describe(self, split: str) -> dict[str, Any]:
        """Family, options and split; there are no classes."""
        check_split(split, self.splits)
        return {"family": "sinusoid", "options": asdict(self), "split": split}
