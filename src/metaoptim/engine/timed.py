"""What a meta-step costs: seconds and peak memory, of several methods side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine.autotune import peak
from metaoptim.engine.engine import Engine

ROUNDS, MOST = 5, 50
ENOUGH = 0.5  # seconds, after which ROUNDS are enough


class TimedStep:
    """A meta-step that has run once, to choose its way, and once more for its peak (`most` bytes; None: not measurable)."""

    def __init__(self, engine: Engine, batch: Task) -> None:
        self.engine, self.phi = engine, engine.method.phi
        self.batch = trees.to(batch, self.phi.device)
        self.carry = engine.init(self.phi, self.batch)
        self.all_seconds: list[float] = []
        self()
        engine.release()  # buffers that are kept from the first call would not show in the peak
        _, self.most = peak.of(self, self.phi.device)

    def __call__(self) -> float:
        return float(self.engine(self.phi, self.batch, self.carry, 0).loss.item())  # a number, so that the device has finished

    def time(self) -> None:
        """One more run, timed."""
        began = time.perf_counter()
        self()
        self.all_seconds.append(time.perf_counter() - began)

    @property
    def method(self) -> MetaOptimizer:
        """Whose meta-step it is."""
        return self.engine.method

    @property
    def seconds(self) -> float:
        """The least that was measured."""
        return min(self.all_seconds)

    @property
    def way(self) -> str:
        """How the engine computes it, such as "vmap graph eager"."""
        choice = self.engine.choice
        return " ".join(choice[:3]) if choice else ""


def side_by_side(steps: Sequence[TimedStep]) -> None:
    """Times meta-steps in turn, so that what else the machine does slows all of them alike: quick ones in more rounds."""
    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or (rounds < MOST and time.perf_counter() - began < ENOUGH):
        for step in steps:
            step.time()
        rounds += 1
