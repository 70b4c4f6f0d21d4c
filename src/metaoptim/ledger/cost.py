"""What a meta-step of a recipe costs, beside one of MAML on the same network, tasks and number of inner steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from metaoptim.algorithms import ALGORITHMS
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine import Engine
from metaoptim.engine.timed import TimedStep, side_by_side
from metaoptim.learners import network_of


def cost(method: MetaOptimizer, batch: Task) -> dict[str, Any]:
    """Seconds and peak bytes of a meta-step, and the same of MAML (None: not measurable), both as a `MetaModule` computes them.

    MAML takes as many inner steps as one outer step of the method goes through, one at the least. Both run on one
    thread and take turns, so that what else the machine does slows both alike.
    """
    network = network_of(method.learner)
    steps = max(1, getattr(method.estimator, "window", None) or method.learner.steps)
    with _one_thread():
        own = _step(method, batch)
        maml = None
        if network is not None and method.name != "maml":
            with suppress(ValueError, RuntimeError):  # a network that MAML can't train
                maml = _step(ALGORITHMS["maml"](network.net, network.loss, steps=steps), batch)
        side_by_side([own] if maml is None else [own, maml])
    told = _told(own)
    return {**told, "maml": told if method.name == "maml" else _told(maml) if maml is not None else None}


def _step(method: MetaOptimizer, batch: Task) -> TimedStep:
    return TimedStep(Engine(method, runtime="eager"), batch)


def _told(step: TimedStep) -> dict[str, Any]:
    return {"seconds": step.seconds, "bytes": step.most, "steps": step.method.learner.steps, "way": step.way}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
