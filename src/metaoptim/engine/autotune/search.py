"""What each way of computing a meta-gradient costs, measured on the real batch; and the fastest one within a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from metaoptim.core.types import MetaOptimizer
from metaoptim.engine.autotune import peak
from metaoptim.engine.options import RUNTIMES, Choice, cut

ROUNDS = 3  # timed runs of a way
ENOUGH = 1.0  # seconds after which fewer will do
SHORT = 0.3  # seconds that quick ways are run again and again for
HOPELESS = 3.0  # a way this many times slower than the best in its first timed run is not timed again
UNKNOWN = 1000  # outer steps to come, where nobody said
TRACING = 300  # outer steps that tracing must be used for: it takes about as long as a hundred of them
COMPILING = 40.0  # times the seconds of tracing: what compiling must be able to win back, which is twice what it takes
GAIN = 0.5  # the part of a step that compiling is expected to win
FEW = 8  # tasks below which a quarter of them is not tried

Build = Callable[[Choice], Callable[[], Any]]


class Row(NamedTuple):
    """One way: seconds per meta-step and bytes at its peak above the start; or, in `note`, why it was not measured."""

    batching: str
    memory: str
    runtime: str
    seconds: float | None = None
    bytes: int | None = None
    note: str = ""


class Plan(NamedTuple):
    """Everything that was measured, what is taken, and why."""

    rows: tuple[Row, ...]
    choice: Choice
    why: str


def offered(method: MetaOptimizer, compiled: bool = False) -> list[tuple[str, str, str]]:
    """All combinations (batching, memory, runtime) that are worth a check; compiled ones, which take long, if asked for."""
    return [
        (batching, memory, runtime)
        for runtime in RUNTIMES
        for batching in ("loop", "vmap", "vmap:2", "workers:2", "workers:2:2")
        for memory in method.estimator.memories
        if (runtime != "eager" or not batching.startswith("workers")) and (runtime != "compile" or compiled)
    ]


class Search:
    """Times ways on one batch, the promising ones first.

    Args:
        build: gives what computes the meta-gradient in one way.
        rest: has all that were built give back what they hold. say: is told which way is measured next.
        settings: batching, memory and runtime as they were given, "auto" where they are open.
        memories: the memory modes that the estimator has.
        count: tasks T in the batch; steps: inner steps K.
        single: bytes at the peak of one task that keeps its states alone, by which others' are foretold (0: unknown).
        budget: bytes at the peak, on the device.
        horizon: outer steps to come: what takes long to build is tried where it can pay.
    """

    def __init__(
        self, build: Build, settings: tuple[str, str, str], memories: Sequence[str], count: int, steps: int, single: int,
        budget: int, device: torch.device, horizon: int, rows: Iterable[Row] = (),
        clock: Callable[[], float] = time.perf_counter, rest: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.build, self.rest, self.say, self.clock = build, rest, say, clock
        self.count, self.steps, self.single = count, steps, single
        self.budget, self.device, self.horizon = budget, device, horizon
        self.batching = None if settings[0] == "auto" else settings[0]
        # Forward mode, which "mixed" needs, is refused by some of torch's functions, and can end the process when traced.
        open_ = [m for m in memories if m != "mixed"]
        self.kept = open_ if settings[1] == "auto" else [settings[1]]
        self.runtimes = [r for r in RUNTIMES if settings[2] in ("auto", r)]
        self.rows = list(rows)
        self.errors: list[Exception] = []
        self.building: dict[tuple[str, str, str], float] = {}  # seconds of the first call, which traces

    def run(self) -> Plan:
        """First how tasks are mapped; for the best mapping, what is kept; last, where it can pay, compiling."""
        quick = [r for r in self.runtimes if r == "eager" or (r == "trace" and self.horizon >= TRACING)]
        for runtime in quick or self.runtimes:
            for batching in self.mappings(runtime):
                fitting = [m for m in self.kept if self.foretold(batching, m) <= self.budget]
                self.measure(batching, fitting[0] if fitting else self.kept[-1], runtime)
        if (best := self.best()) is not None:
            for memory in self.kept:
                self.measure(best.batching, memory, best.runtime)
            best = self.best() or best
            for row in self.rivals(best) if "compile" in self.runtimes else []:
                if self.horizon * (best.seconds or 0.0) * GAIN > COMPILING * self.building.get(row[:3], math.inf):
                    self.measure(row.batching, row.memory, "compile")
        return self.conclusion()

    def rivals(self, best: Row) -> list[Row]:
        """The two fastest traced ways, of different mappings, that compiling could make the best one."""
        limit = (best.seconds or 0.0) * (1 + GAIN)
        traced = [row for row in self.rows if row.runtime == "trace" and row.seconds is not None and row.seconds <= limit]
        found: dict[str, Row] = {}
        for row in sorted(traced, key=lambda row: row.seconds or 0.0):
            if (row.bytes or 0) <= self.budget:
                found.setdefault(row.batching, row)
        return list(found.values())[:2]

    def mappings(self, runtime: str) -> list[str]:
        """The values of `batching` to try."""
        if self.batching is not None:
            return [self.batching]
        found, threads = ["vmap", "loop"], torch.get_num_threads()
        if self.single * self.count > self.budget > self.single:
            found.append(f"vmap:{self.budget // self.single}")
        elif runtime == "trace" and self.count >= FEW:
            found.append(f"vmap:{self.count // 4}")  # whose values may stay in the processor's cache
        if runtime == "trace" and threads > 1 and self.count > 1:
            found += [f"workers:{threads}", f"workers:{threads}:{-(-self.count // threads)}"]
        return found

    def foretold(self, batching: str, memory: str) -> int:
        """Bytes at the peak, roughly, from those of one task and one step at a time."""
        how = cut(batching)
        at_once = min(self.count, (self.count if how.size is None else how.size) * how.workers)
        return self.single * at_once * (max(1, self.steps) if memory == "graph" else 1)

    def measure(self, batching: str, memory: str, runtime: str) -> None:
        """Adds a row, unless there is one."""
        if any(row[:3] == (batching, memory, runtime) for row in self.rows):
            return
        if (expected := self.foretold(batching, memory)) > self.budget:
            self.rows.append(Row(batching, memory, runtime, None, expected, "not tried: above the memory budget"))
            return
        try:
            self.rest()
            self.say(f"measuring {batching}, {memory}, {runtime}")
            run = self.build(Choice(batching, memory, runtime))
            start = self.clock()
            run()  # traces, compiles, warms up
            self.building[batching, memory, runtime] = self.clock() - start
            self.rest()
            _, used = peak.of(run, self.device)
        except Exception as error:  # whatever torch can say, as of a layer that vmap has no rule for
            self.errors.append(error)
            self.rows.append(Row(batching, memory, runtime, note=" ".join(str(error).split())))
            return
        fastest = min((row.seconds for row in self.rows if row.seconds is not None), default=float("inf"))
        best, spent, runs = float("inf"), 0.0, 0
        while not runs or (spent < (ENOUGH if runs < ROUNDS else SHORT) and best <= HOPELESS * fastest):
            start = self.clock()
            run()
            seconds = self.clock() - start
            best, spent, runs = min(best, seconds), spent + seconds, runs + 1
        self.rows.append(Row(batching, memory, runtime, best, used))

    def best(self) -> Row | None:
        """The fastest within the budget; where nothing keeps to it, the one with the lowest peak."""
        timed = [row for row in self.rows if row.seconds is not None]
        within = [row for row in timed if (row.bytes or 0) <= self.budget]
        if within:
            return min(within, key=lambda row: row.seconds or 0.0)
        return min(timed, key=lambda row: row.bytes or 0, default=None)

    def conclusion(self) -> Plan:
        """The plan that the rows speak for. The first error where every way was refused."""
        best, limit = self.best(), f"{self.budget / 2**30:.2g} GiB"
        if best is None and self.errors:
            raise self.errors[0]
        if best is None:
            least = min(self.rows, key=lambda row: row.bytes or 0)
            raise ValueError(
                f"no way keeps to the memory budget of {limit}: the least, {', '.join(least[:3])}, needs about "
                f"{(least.bytes or 0) / 2**30:.2g} GiB; give a larger engine.budget, or smaller tasks."
            )
        timed = {", ".join(row[:3]): row.seconds for row in self.rows if row.seconds is not None}
        if (best.bytes or 0) > self.budget:
            why = f"no way keeps to {limit}; of the {len(timed)} that were timed this one has the lowest peak"
        else:
            why = f"the fastest of the {len(timed)} ways that were timed, with a peak within {limit}"
        return Plan(tuple(self.rows), Choice(*best[:3], timed), why)
