"""The stretches of problems that an outer step trains on, when runs have several lengths and begin at several times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaoptim.core import trees
from metaoptim.core.checks import check_counts
from metaoptim.core.types import MetaParams, Task
from metaoptim.lopt.mixture import Family
from metaoptim.tasks.base import uniforms


@dataclass(frozen=True)
class Streams:
    """T slots, each of which trains one problem after the other, W steps in each outer step.

    A run's length is log-uniform between two horizons, in whole windows, so that no window has the end of a run inside. The
    first run of each slot is cut short at random: from then on the slots stand at different places of their runs, and an outer
    step sees early and late training at once (Metz 2022, section 4; Vicol 2021).
    """

    problems: Family
    seed: int
    count: int
    window: int
    horizons: tuple[int, ...]

    def __post_init__(self) -> None:
        check_counts(window=self.window, count=self.count)
        ends = self.horizons
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] or ends[0] % self.window or ends[1] % self.window:
            raise ValueError(
                f"horizons={ends}: they must be two multiples of the window, which is {self.window}, the smaller one "
                "first, so that a run ends with a window."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which stretches there are, beside the family and the seed."""
        return {"window": self.window, "horizons": list(self.horizons)}

    def __call__(self, outer_step: int, phi: MetaParams) -> Task:
        ends = _ends(self, 1 << max(outer_step.bit_length(), 4))
        run = (ends <= outer_step).sum(1)
        slot = np.arange(self.count)
        begun = np.where(run > 0, ends[slot, run - 1], 0)
        firsts = ((outer_step - begun) * self.window).tolist()
        lengths = ((ends[slot, run] - begun) * self.window).tolist()
        numbers = (run * self.count + slot).tolist()
        return trees.to(self.problems.stretch("train", self.seed, numbers, firsts, lengths, self.window), phi.device)


@lru_cache(maxsize=4)
def _ends(streams: Streams, runs: int) -> NDArray[np.int64]:
    """The outer step at which each run of each slot is over, [T, runs]."""
    low, high = (math.log(h / streams.window) for h in streams.horizons)
    drawn = uniforms(streams.seed, "horizons", 0, runs * streams.count, 2).reshape(runs, streams.count, 2)
    windows = np.maximum(np.rint(np.exp(low + (high - low) * drawn[..., 0])), 1)
    windows[0] = np.maximum(np.ceil(windows[0] * drawn[0, :, 1]), 1)
    return windows.astype(np.int64).cumsum(0).T
