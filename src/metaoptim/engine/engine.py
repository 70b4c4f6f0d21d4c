"""The engine: meta-gradients in the way that was asked for, or in the best one that was measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from metaoptim.core import trees
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Task
from metaoptim.engine.autotune import cache, peak
from metaoptim.engine.autotune.search import UNKNOWN, Plan, Search
from metaoptim.engine.executor import Executor, check_tasks, explained, starts
from metaoptim.engine.options import Choice, check_settings

SHARE = 0.7  # of the memory that is free, for a budget that was not given


class Engine:
    """Computes meta-gradients: `engine(phi, batch, carry, outer_step) -> Estimate` over T tasks; no carry: of runs that begin.

    The loss and the gradient are put together as the meta-optimizer asks (mean or sum, always in the order of the
    tasks); the carry keeps its leading axis T; `info["losses"]` holds the T single losses, other entries are means.
    Every setting gives the same numbers, up to rounding (but for precision="bf16"); "auto" is the fastest that was seen on
    the first batch, among those whose peak memory keeps to the budget.

    Args:
        method: the meta-optimizer whose estimator and learner run.
        batching: "loop", "vmap", "vmap:C" (C tasks at a time), "workers:W" (W threads with one task each), "workers:W:C"
            (with C tasks at a time), or "auto".
        memory: what is kept of the inner run: "graph" (all of it), "steps" (its states), "mixed" (states and gradients, with
            forward-over-reverse second derivatives), or "auto", which never takes "mixed".
        runtime: "eager" (torch calls one by one), "trace" (a graph of them, traced once), "compile" (the graph compiled by
            Inductor, which needs a C++ compiler), or "auto".
        precision: "full", or "bf16": matrix products and convolutions in bfloat16, by autocast.
        budget: gibibytes that "auto" may use at the peak of a meta-step; none: most of what is free.
        horizon: outer steps to come, by which "auto" judges whether tracing and compiling pay; none: a thousand or so.
    """

    def __init__(
        self,
        method: MetaOptimizer,
        batching: str = "auto",
        memory: str = "auto",
        runtime: str = "auto",
        precision: str = "full",
        budget: float | None = None,
        horizon: int | None = None,
    ) -> None:
        check_settings(batching, memory, runtime, precision)
        if budget is not None and not budget > 0:
            raise ValueError(f"engine.budget = {budget}: it must be a positive number of gibibytes, or none.")
        self.method, self.batching, self.memory, self.runtime, self.precision = method, batching, memory, runtime, precision
        self.budget, self.horizon = budget, horizon
        auto = "auto" in (batching, memory, runtime)
        self.choice: Choice | None = None if auto else Choice(batching, memory, runtime)
        self.say: Callable[[str], None] = lambda text: None  # is told what is being measured, which can take minutes
        self._executors: dict[tuple[str, str, str], Executor] = {}

    def init(self, phi: MetaParams, batch: Task) -> Carry:
        """The carry of the T task slots of a batch before the first outer step."""
        check_tasks(batch)
        with explained(batch, self.method):
            return starts(self.method, phi, batch)

    def __call__(self, phi: MetaParams, batch: Task, carry: Carry | None = None, outer_step: int = 0) -> Estimate:
        count = check_tasks(batch)
        carry = self.init(phi, batch) if carry is None else carry
        slots = {x.shape[0] for x in trees.flatten(carry)}
        if slots - {count}:
            raise ValueError(
                f"the batch has {count} tasks and this algorithm carries its state for {slots.pop()} task slots; keep the "
                "number of tasks per step the same, or choose an algorithm that carries nothing."
            )
        with explained(batch, self.method):
            if self.choice is None:
                self.choice = self.plan(phi, batch, carry).choice
            return self.executor(self.choice)(phi, batch, carry, outer_step)

    def plan(self, phi: MetaParams, batch: Task, carry: Carry = (), again: bool = False) -> Plan:
        """What the ways that the settings leave open cost on this batch, and the best; remembered for this work and machine.

        again: measured anew, whatever is remembered.
        """
        estimator, learner = self.method.estimator, self.method.learner
        settings = (self.batching, self.memory, self.runtime)
        key = cache.key(self.method, phi, batch, (*settings, self.precision, str(self.budget)))
        known = None if again else cache.read(key)
        free = peak.free(phi.device)
        budget = int(self.budget * 2**30) if self.budget else int(SHARE * free) if free else 2**40

        def build(choice: Choice) -> Callable[[], float]:
            executor = self.executor(choice)
            return lambda: executor(phi, batch, carry, 0).loss.item()  # a number, so that the device has finished

        with torch.random.fork_rng(devices=[]):  # dropout must draw the same, measured or remembered
            single = 0
            if known is None and "steps" in estimator.memories:
                few = trees.index((batch, carry), slice(1))
                alone = Executor(self.method, "loop", "steps", "eager", self.precision)
                single = peak.of(lambda: alone(phi, few[0], few[1], 0), phi.device)[1] or 0
            search = Search(build, settings, estimator.memories, check_tasks(batch), learner.steps, single, budget,
                            phi.device, self.horizon or UNKNOWN, known or (), rest=self.release, say=self.say)  # fmt: skip
            found = search.run()
        cache.write(key, found.rows)
        taken = found.choice[:3]
        self._executors = {how: executor for how, executor in self._executors.items() if how == taken}  # no other runs again
        return found

    def executor(self, choice: Choice) -> Executor:
        """What computes the meta-gradient in one way; what it has traced is kept."""
        settings = (choice.batching, choice.memory, choice.runtime)
        if settings not in self._executors:
            self._executors[settings] = Executor(self.method, *settings, self.precision)
        return self._executors[settings]

    def release(self) -> None:
        """Until the next call, gives back the memory of graphs and ends the threads of "workers"."""
        for executor in self._executors.values():
            executor.release()

    def restore(self, choice: Choice) -> None:
        """Takes over the choice of an earlier process, so that a resumed run computes the same floats."""
        given = (self.batching, self.memory, self.runtime)
        if all(setting in ("auto", value) for setting, value in zip(given, choice[:3], strict=True)):
            self.choice = choice
