"""What a meta-step of a recipe costs, beside one of MAML on the same network, tasks and number of inner steps."""

from __future__ import annotations

import time
from typing import Any

from metaoptim.algorithms import ALGORITHMS
from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine import Engine
from metaoptim.engine.autotune import peak
from metaoptim.learners import network_of

RUNS = 3


def cost(method: MetaOptimizer, batch: Task) -> dict[str, Any]:
    """Seconds and peak bytes of a meta-step, and the same of MAML (None: not measurable), both as a `MetaModule` computes them.

    MAML takes as many inner steps as one outer step of the method goes through, one at the least.
    """
    network, own = network_of(method.learner), _measured(method, batch)
    if network is None or method.name == "maml":
        return {**own, "maml": own if method.name == "maml" else None}
    steps = max(1, getattr(method.estimator, "window", None) or method.learner.steps)
    try:
        return {**own, "maml": _measured(ALGORITHMS["maml"](network.net, network.loss, steps=steps), batch)}
    except (ValueError, RuntimeError):  # a network that MAML can't train must not cost the number that was measured
        return {**own, "maml": None}


def _measured(method: MetaOptimizer, batch: Task) -> dict[str, Any]:
    engine = Engine(method, runtime="eager")
    here = trees.to(batch, method.phi.device)
    carry = engine.init(method.phi, here)

    def step() -> float:
        return float(engine(method.phi, here, carry, 0).loss.item())  # a number, so that the device has finished

    step()  # chooses the way, and warms up
    _, most = peak.of(step, method.phi.device)
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    way = engine.choice
    return {"seconds": min(seconds), "bytes": most, "steps": method.learner.steps, "way": " ".join(way[:3]) if way else ""}
