"""The engine: meta-gradients in the way that was asked for, or in the best one that was measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from metaoptim.core import trees
from metaoptim.core.types import Carry, Estimate, Meta, MetaOptimizer, Task
from metaoptim.engine.autotune import cache, peak
from metaoptim.engine.autotune.search import UNKNOWN, Plan, Search
from metaoptim.engine.executor import Way, check_tasks, explained
from metaoptim.engine.options import Choice, check_settings

SHARE = 0.7  # of the memory that is free, for a budget that was not given


class Engine:
    """Computes meta-gradients: `engine(meta, batch, carry) -> Estimate` over T tasks.

    The loss and the gradient are put together as the meta-optimizer asks (mean or sum, always in the order of the
    tasks); the carry keeps its leading axis T; `info["losses"]` holds the T single losses, other entries are means.
    Every setting gives the same numbers, up to rounding (but for precision="bf16"); "auto" is the fastest that was seen on
    the first batch, among those whose peak memory keeps to the budget.

    Args:
        optimizer: whose estimator and learner run.
        tasks: "loop", "vmap", "vmap:C" (C tasks at a time), "workers:W" (W threads with one task each), "workers:W:C" (with C
            tasks at a time), or "auto".
        memory: what is kept of the inner run: "graph" (all of it), "steps" (its states), "mixed" (states and gradients, with
            forward-over-reverse second derivatives), or "auto".
        runtime: "eager" (torch calls one by one), "trace" (a graph of them, traced once), "compile" (the graph compiled by
            Inductor, which needs a C++ compiler), or "auto".
        precision: "full", or "bf16": matrix products and convolutions in bfloat16, by autocast.
        budget: gibibytes that "auto" may use at the peak of a meta-step; none: most of what is free.
        horizon: outer steps to come, by which "auto" judges whether tracing and compiling pay; none: a thousand or so.
    """

    def __init__(
        self,
        optimizer: MetaOptimizer,
        tasks: str = "auto",
        memory: str = "auto",
        runtime: str = "auto",
        precision: str = "full",
        budget: float | None = None,
        horizon: int | None = None,
    ) -> None:
        check_settings(tasks, memory, runtime, precision)
        if budget is not None and not budget > 0:
            raise ValueError(f"engine.budget = {budget}: it must be a positive number of gibibytes, or none.")
        self.optimizer, self.tasks, self.memory, self.runtime, self.precision = optimizer, tasks, memory, runtime, precision
        self.budget, self.horizon = budget, horizon
        auto = "auto" in (tasks, memory, runtime)
        self.choice: Choice | None = None if auto else Choice(tasks, memory, runtime)
        self.say: Callable[[str], None] = lambda text: None  # is told what is being measured, which can take minutes
        self._ways: dict[tuple[str, str, str], Way] = {}

    def init(self, meta: Meta, count: int) -> Carry:
        """The carry of `count` task slots before the first outer step."""
        return trees.stack([self.optimizer.estimator.init(self.optimizer.learner, meta)] * count)

    def __call__(self, meta: Meta, batch: Task, carry: Carry = ()) -> Estimate:
        count = check_tasks(batch)
        slots = {x.shape[0] for x in trees.flatten(carry)}
        if slots - {count}:
            raise ValueError(
                f"the batch has {count} tasks and this algorithm carries its state for {slots.pop()} task slots; keep the "
                'number of tasks per step, or choose moments="reset".'
            )
        with explained(batch, self.optimizer):
            if self.choice is None:
                self.choice = self.plan(meta, batch, carry).choice
            return self.way(self.choice)(meta, batch, carry)

    def plan(self, meta: Meta, batch: Task, carry: Carry = (), again: bool = False) -> Plan:
        """What the ways that the settings leave open cost on this batch, and the best; remembered for this work and machine.

        again: measured anew, whatever is remembered.
        """
        estimator, learner = self.optimizer.estimator, self.optimizer.learner
        settings = (self.tasks, self.memory, self.runtime)
        key = cache.key(self.optimizer, meta, batch, (*settings, self.precision, str(self.budget)))
        known = None if again else cache.read(key)
        free = peak.free(meta.device)
        budget = int(self.budget * 2**30) if self.budget else int(SHARE * free) if free else 2**40

        def build(choice: Choice) -> Callable[[], float]:
            way = self.way(choice)
            return lambda: way(meta, batch, carry).loss.item()  # a number, so that the device has finished

        with torch.random.fork_rng(devices=[]):  # dropout must draw the same, measured or remembered
            single = 0
            if known is None and "steps" in estimator.memories:
                alone = Way(self.optimizer, "loop", "steps", "eager", self.precision)
                single = peak.of(lambda: alone(meta, *trees.index((batch, carry), slice(1))), meta.device)[1] or 0
            search = Search(build, settings, estimator.memories, check_tasks(batch), learner.steps, single, budget,
                            meta.device, self.horizon or UNKNOWN, known or (), rest=self.rest, say=self.say)  # fmt: skip
            found = search.run()
        cache.write(key, found.rows)
        self._ways = {how: way for how, way in self._ways.items() if how == found.choice[:3]}  # no other graph runs again
        return found

    def way(self, choice: Choice) -> Way:
        """The meta-gradient computed in one way; what it has traced is kept."""
        settings = (choice.tasks, choice.memory, choice.runtime)
        if settings not in self._ways:
            self._ways[settings] = Way(self.optimizer, *settings, self.precision)
        return self._ways[settings]

    def rest(self) -> None:
        """Until the next call, gives back the memory of graphs and ends the threads of "workers"."""
        for way in self._ways.values():
            way.rest()

    def restore(self, choice: Choice) -> None:
        """Takes over the choice of an earlier process, so that a resumed run computes the same floats."""
        given = (self.tasks, self.memory, self.runtime)
        if all(setting in ("auto", value) for setting, value in zip(given, choice[:3], strict=True)):
            self.choice = choice
