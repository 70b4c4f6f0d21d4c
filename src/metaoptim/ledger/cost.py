"""What a meta-step of a recipe costs, beside one of MAML on the same network, tasks and number of inner steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from metaoptim.algorithms import ALGORITHMS
from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine import Engine
from metaoptim.engine.autotune import peak
from metaoptim.learners import network_of

RUNS = 5


def cost(method: MetaOptimizer, batch: Task) -> dict[str, Any]:
    """Seconds and peak bytes of a meta-step, and the same of MAML (None: not measurable), both as a `MetaModule` computes them.

    MAML takes as many inner steps as one outer step of the method goes through, one at the least. Both run on one
    thread and take turns, so that what else the machine does slows both alike.
    """
    network = network_of(method.learner)
    steps = max(1, getattr(method.estimator, "window", None) or method.learner.steps)
    with _one_thread():
        own = _Step(method, batch)
        maml = None
        if network is not None and method.name != "maml":
            with suppress(ValueError, RuntimeError):  # a network that MAML can't train
                maml = _Step(ALGORITHMS["maml"](network.net, network.loss, steps=steps), batch)
        for _ in range(RUNS):
            own.time()
            if maml is not None:
                maml.time()
    told = own.told()
    return {**told, "maml": told if method.name == "maml" else maml.told() if maml is not None else None}


class _Step:
    """A meta-step that has run once, to choose its way, and once more for its peak."""

    def __init__(self, method: MetaOptimizer, batch: Task) -> None:
        self.engine, self.phi, self.batch = Engine(method, runtime="eager"), method.phi, trees.to(batch, method.phi.device)
        self.carry = self.engine.init(self.phi, self.batch)
        self.seconds: list[float] = []
        self()
        _, self.most = peak.of(self, self.phi.device)

    def __call__(self) -> float:
        return float(self.engine(self.phi, self.batch, self.carry, 0).loss.item())  # a number, so that the device has finished

    def time(self) -> None:
        began = time.perf_counter()
        self()
        self.seconds.append(time.perf_counter() - began)

    def told(self) -> dict[str, Any]:
        way = self.engine.choice
        steps = self.engine.method.learner.steps
        return {"seconds": min(self.seconds), "bytes": self.most, "steps": steps, "way": " ".join(way[:3]) if way else ""}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
