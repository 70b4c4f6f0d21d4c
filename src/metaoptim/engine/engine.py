"""The engine: meta-gradients in the way that was asked for, by rule, or in the best way that was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_method, check_positive
from metaoptim.core.random import rewinder
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Task
from metaoptim.engine.autotune import cache, peak
from metaoptim.engine.autotune.search import UNKNOWN, Plan, Search
from metaoptim.engine.executor import Executor, check_tasks, starts, tasks_of
from metaoptim.engine.faults import explained, sentence
from metaoptim.engine.gate import gap
from metaoptim.engine.graphs.guards import Unsteady
from metaoptim.engine.inspect import inspect
from metaoptim.engine.options import Choice, check_settings, chosen
from metaoptim.engine.reducer import Reducer
from metaoptim.engine.rule import by_rule

SHARE = 0.7  # of the machine's memory, for a budget that was not given


class Engine:
    """Computes meta-gradients: `engine(phi, batch, carry, outer_step) -> Estimate` over T tasks; no carry: of runs that begin.

    The loss and the gradient are put together as the meta-optimizer's `reduction` asks, in the order of the tasks; where it
    weighs gradients, the loss is the mean, and `info["conflicts"]` the share of pairs of tasks that conflict. The carry keeps
    its leading axis T; `info["losses"]` holds the T single losses, other entries are means.
    Every setting gives the same numbers, up to rounding (but for precision="bf16"). What is "auto" follows a rule, and nothing
    is timed, unless runtime is "auto" too: then the fastest way is taken that was seen on a batch, with a peak in the budget.
    A way that was not asked for by name must agree with the plain loop, task by task, on the first batch and, where it was
    measured, on the 2nd, 4th, 8th, …; where it fails or differs, the loop takes over, with a warning.

    Args:
        method: the meta-optimizer whose estimator and learner run.
        batching: "loop", "vmap", "vmap:C" (C tasks at a time), "workers:W" (W threads with one task each), "workers:W:C"
            (with C tasks at a time), or "auto".
        memory: what is kept of the inner run: "graph" (all of it), "steps" (its states), "mixed" (states and gradients, with
            forward-over-reverse second derivatives), or "auto", which never takes "mixed".
        runtime: "eager" (torch calls one by one), "trace" (a graph of them, traced once, and again where something changes that
            the code reads), "compile" (the graph compiled by Inductor, which needs a C++ compiler), or "auto".
        precision: "full", or "bf16": matrix products and convolutions in bfloat16, by autocast.
        budget: gibibytes that "auto" may use at the peak of a meta-step; none: most of what there is.
        horizon: outer steps to come, by which "auto" judges whether tracing and compiling pay; none: a thousand or so.
        wait: outer steps to take by rule before anything is measured.
        choice: what was measured in an earlier run, such as "vmap graph trace": taken after `wait` steps, with nothing timed.
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
        wait: int = 0,
        choice: str | None = None,
    ) -> None:
        check_method(method, "Engine")
        check_settings(batching, memory, runtime, precision)
        check_positive(**{"engine.budget": budget})
        self.method, self.batching, self.memory, self.runtime, self.precision = method, batching, memory, runtime, precision
        self.budget, self.horizon, self.wait = budget, horizon, wait
        auto = "auto" in (batching, memory, runtime)
        self.choice: Choice | None = None if auto else Choice(batching, memory, runtime)
        # Whether the model was looked at, the choice was measured, and it was held to the plain loop.
        self.inspected = self.measured = self.proved = False
        self.taken = 0  # meta-gradients, in the way that is held to the plain loop
        self.preset: Choice | None = None if choice is None else chosen(choice)
        if self.preset is not None and not self._open(self.preset):
            raise ValueError(
                f"engine.choice = {choice!r} is none of {batching}, {memory}, {runtime}; leave out one or the other."
            )
        self.decided: Callable[[Choice], None] = _ignored  # is told what was measured, before it is used
        self.say: Callable[[str], None] = _silent  # is told what is being measured, which can take minutes
        self._executors: dict[tuple[str, str, str], Executor] = {}

    def __repr__(self) -> str:
        chosen = f", chosen: {'/'.join(self.choice[:3])}" if self.choice is not None and self.choice.by != "name" else ""
        return f"Engine({self.method.name}, {self.batching}/{self.memory}/{self.runtime}{chosen})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings and the choice, and makes its own graphs and threads."""
        return self.__dict__ | {"_executors": {}, "say": _silent, "decided": _ignored}

    def init(self, phi: MetaParams, batch: Task) -> Carry:
        """The carry of the T task slots of a batch before the first outer step."""
        batch = tasks_of(batch)
        check_tasks(batch)
        with explained(batch, self.method):
            return starts(self.method, phi, batch)

    def __call__(self, phi: MetaParams, batch: Task, carry: Carry | None = None, outer_step: int = 0) -> Estimate:
        if torch.is_inference_mode_enabled():
            raise ValueError("inside torch.inference_mode() there are no gradients; take the meta-gradient outside of it.")
        batch = tasks_of(batch)
        count = check_tasks(batch)
        carry = self.init(phi, batch) if carry is None else carry
        slots = {x.shape[0] for x in trees.flatten(carry)}
        if slots - {count}:
            raise ValueError(
                f"the batch has {count} tasks and this algorithm carries its state for {slots.pop()} task slots; keep the "
                "number of tasks per step the same, or choose an algorithm that carries nothing."
            )
        with explained(batch, self.method):
            if not self.inspected:
                self.inspected = True
                inspect(self.method, phi, batch, carry, self.memory)
            return self._held(self._choose(phi, batch, carry, outer_step), phi, batch, carry, outer_step)

    def _choose(self, phi: MetaParams, batch: Task, carry: Carry, outer_step: int) -> Choice:
        settings = (self.batching, self.memory, self.runtime)
        if self.runtime == "auto" and not self.measured and outer_step >= self.wait:
            found = self.preset or self.plan(phi, batch, carry).choice
            self.decided(found)
            self.choice, self.measured, self.proved, self.taken = found, True, False, 0
        if self.choice is None:
            self.choice = by_rule(self.method, phi, batch, settings, self._limit(peak.total(phi.device)))
        return self.choice

    def _held(self, choice: Choice, *args: Any) -> Estimate:
        """The estimate in that way, held to the plain loop from time to time; that loop's, where the way fails or differs."""
        plain = Choice("loop", "steps" if choice.memory == "mixed" else choice.memory, "eager", by="rule")
        named = choice.by == "name" or choice[:3] == plain[:3]
        back = rewinder()
        try:
            found = self.executor(choice)(*args)
        except Unsteady as error:
            back()
            return self._fallen(choice, plain, str(error), *args)
        except Exception as error:  # torch can raise anything, as for a layer without a batching rule
            if named:
                raise
            back()
            return self._fallen(choice, plain, sentence(error, self.method, taken_over=True), *args)
        self.taken += 1
        if named or (self.proved and (choice.by == "rule" or self.taken & (self.taken - 1))):
            return found
        on = rewinder()

        def by(way: Choice, phi: MetaParams) -> Estimate:
            back()
            return self.executor(way)(phi, *args[1:])

        expected = by(plain, args[0])
        half, again, plainly = self.precision == "bf16", partial(by, choice), partial(by, plain)
        if off := gap(self.method, half, args[0], found, expected, again, plainly):
            far = f"its meta-gradient is {100 * off:.3g} % off that of the plain loop"
            since = f"{far}, and was not {self.taken // 2} calls ago: the model, the loss or the rule reads something that has "
            since += "changed without being seen, and meta-gradients since then may be wrong too"
            self._fall(choice, plain, since if self.proved else f"{far} (mo.check says where)")
            return expected
        on()
        self.proved = True
        return found

    def _fallen(self, choice: Choice, plain: Choice, reason: str, *args: Any) -> Estimate:
        """The estimate by the plain loop, which is taken from now on unless it fails too."""
        found = self.executor(plain)(*args)
        self._fall(choice, plain, reason)
        return found

    def _fall(self, choice: Choice, plain: Choice, reason: str) -> None:
        warn(f"{', '.join(choice[:3])}: {reason}. From here on: {', '.join(plain[:3])}.")
        self.choice, self.proved = plain, True

    def _limit(self, memory: int | None) -> int:
        """The memory budget in bytes, of a machine (or what is free of it) with so many."""
        return int(self.budget * 2**30) if self.budget else int(SHARE * memory) if memory else 2**40

    def plan(self, phi: MetaParams, batch: Task, carry: Carry = (), again: bool = False) -> Plan:
        """What the ways that the settings leave open cost on this batch, and the best; remembered for this work and machine.

        again: measured anew, whatever is remembered.
        """
        self.say("choosing the fastest way to compute the meta-gradient (once for each work)")
        estimator, learner = self.method.estimator, self.method.learner
        settings = (self.batching, self.memory, self.runtime)
        key = cache.key(self.method, phi, batch, (*settings, self.precision, str(self.budget), str(self.horizon)))
        known = None if again else cache.read(key)
        budget = self._limit(peak.free(phi.device))

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
                            phi.device, self.horizon or UNKNOWN, known or (), rest=self.release, say=self.say,
                            attempt=cache.Journal(key), beside=Reducer(self.method).bytes(phi, check_tasks(batch)))  # fmt: skip
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

    def _open(self, choice: Choice) -> bool:
        """Whether the settings leave a choice open."""
        given = (self.batching, self.memory, self.runtime)
        return all(setting in ("auto", value) for setting, value in zip(given, choice[:3], strict=True))

    def release(self) -> None:
        """Until the next call, gives back the memory of graphs and ends the threads of "workers"."""
        for executor in self._executors.values():
            executor.release()

    def restore(self, choice: Choice) -> None:
        """Takes over the choice of an earlier process, so that a resumed run computes the same floats."""
        if self._open(choice):
            self.choice, self.measured, self.proved = choice, choice.by == "measurement", True


def _ignored(choice: Choice) -> None:
    """Does nothing."""


def _silent(text: str) -> None:
    """Tells nobody."""
