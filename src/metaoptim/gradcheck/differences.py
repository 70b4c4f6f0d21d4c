"""Slopes by central differences, in float64, and what a gradient says of them.

A kink (ReLU, max-pooling) that lies within a step spoils the difference, and an inner gradient makes a jump of it; a short
step is spoilt by rounding. That happens along one direction, or at one step size. A fault shows along all of them, so the
best of a few counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from metaoptim.core import trees
from metaoptim.core.types import Params

TOLERANCE = 1e-6
"""Relative, for a gradient against central differences."""

EXACT = 1e-9
"""Relative, for one way to compute a gradient against another."""

SIZES = (1e-5, 1e-6, 1e-7)  # of a step along a direction of length 1
TRIES = 4  # directions
NOISE = 4.0  # units in the last place by which a value is uncertain; seen: up to 1
DOUBT = 100.0  # times that noise: beyond it a gap counts in full, for rounding grows in long runs


class Probe(NamedTuple):
    """The slope of a function along a direction, by central differences, how far rounding may move it, and the usual slope."""

    direction: Params
    slope: float
    noise: float
    usual: float

    def error(self, gradient: Params) -> float:
        """How far a gradient's slope is from it, relative to the largest of both and the usual one; infinite where one isn't
        finite. A gap that rounding explains is within the tolerance, and one of up to 100 times that in proportion."""
        found = trees.dot(self.direction, gradient).item()
        if not math.isfinite(found) or not math.isfinite(self.slope):
            return math.inf
        gap, size = abs(found - self.slope), max(abs(found), abs(self.slope), self.usual)
        doubtful = min(gap, DOUBT * self.noise)
        return gap / size - doubtful * (1 / size - 1 / max(size, self.noise / TOLERANCE)) if gap else 0.0

    def bound(self, gradient: Params) -> float:
        """The largest gap that there may be."""
        return abs(trees.dot(self.direction, gradient).item() - self.slope) + self.noise


def probe(
    f: Callable[[Params], float], at: Params, gradient: Params, only: Collection[str] = (), tries: int = TRIES
) -> tuple[Probe, float]:
    """A slope of f that agrees with its gradient, or else a usual one, and the gradient's relative error there.

    Directions are random in all tensors, or in those named in `only`.
    """
    draw = torch.Generator().manual_seed(0)
    names = list(only or at)
    # The root mean square of the slope over all directions: one that is nearly level says little.
    usual = math.sqrt(sum(gradient[n].square().sum().item() for n in names) / sum(at[n].numel() for n in names))
    best: list[tuple[Probe, float]] = []  # of each direction
    for _ in range(tries):
        random = {
            n: torch.randn(at[n].shape, generator=draw, dtype=at[n].dtype, device=draw.device).to(at[n].device) for n in names
        }
        size = trees.norm(random)
        direction = {n: v / size for n, v in random.items()}
        surest: Probe | None = None  # of all sizes: a short step, and a slope that is lost in rounding, prove nothing
        for h in SIZES:
            ahead, behind = (f(at | {n: at[n] + e * v for n, v in direction.items()}) for e in (h, -h))
            noise = NOISE * torch.finfo(torch.float64).eps * max(abs(ahead), abs(behind)) / h
            seen = Probe(direction, (ahead - behind) / (2 * h), noise, usual)
            if surest is None or not seen.bound(gradient) >= surest.bound(gradient):
                surest = seen
                if seen.error(gradient) <= TOLERANCE:
                    return seen, seen.error(gradient)
        if surest is not None:
            best.append((surest, surest.error(gradient)))
    return sorted(best, key=lambda pair: pair[1])[tries // 2]


def distance(a: Params, b: Params) -> float:
    """‖a − b‖ relative to the longer of both."""
    gap = trees.norm(trees.subtract(a, b)).item()
    return gap / max(trees.norm(a).item(), trees.norm(b).item()) if gap else 0.0


@contextmanager
def seeded(device: torch.device, seed: int | None = 0) -> Iterator[None]:
    """Inside, torch draws the same each time (None: goes on from where it is); outside, its generators are as before."""
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        if seed is not None:
            torch.manual_seed(seed)
        yield
