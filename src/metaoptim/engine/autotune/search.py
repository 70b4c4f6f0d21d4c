"""Times ways of computing a meta-gradient on the real batch, and chooses the fastest one within a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from metaoptim.core.types import MetaOptimizer
from metaoptim.engine.autotune import peak
from metaoptim.engine.options import RUNTIMES, Choice, cut

ROUNDS = 3  # timed runs per way
ENOUGH = 1.0  # seconds after which fewer runs will do
SHORT = 0.3  # seconds for which fast ways are run again and again
HOPELESS = 3.0  # a way this many times slower than the best in its first timed run is not timed again
UNKNOWN = 1000  # outer steps to come, where nobody said
TRACING = 300  # outer steps that must be to come for tracing to be tried: it takes about as long as a hundred of them
COMPILING = 40.0  # times the seconds of tracing: what compiling must be able to save, which is twice what it takes
GAIN = 0.5  # the share of a step's time that compiling is expected to save
FEW = 8  # tasks below which a quarter of them at a time is not tried

Build = Callable[[Choice], Callable[[], Any]]


Way = tuple[str, str, str]


class Attempt(Protocol):
    """Told of every way before it is built, so that the next process knows where one ended."""

    def __call__(self, way: Way) -> AbstractContextManager[None]: ...

    def died(self, way: Way) -> bool:
        """Whether a process ended while it tried this way."""
        ...


class Unwatched:
    """Nobody is told."""

    def __call__(self, way: Way) -> AbstractContextManager[None]:
        return nullcontext()

    def died(self, way: Way) -> bool:
        return False


class Row(NamedTuple):
    """One way: seconds per meta-step, and peak bytes above the start; or, in `note`, why it was not measured."""

    batching: str
    memory: str
    runtime: str
    seconds: float | None = None
    bytes: int | None = None
    note: str = ""


class Plan(NamedTuple):
    """Everything that was measured, the choice, and the reason for it."""

    rows: tuple[Row, ...]
    choice: Choice
    why: str


def offered(method: MetaOptimizer, compiled: bool = False) -> list[tuple[str, str, str]]:
    """All combinations (batching, memory, runtime) worth checking; compiled ones, which take long, only if asked for."""
    return [
        (batching, memory, runtime)
        for runtime in RUNTIMES
        for batching in ("loop", "vmap", "vmap:2", "workers:2", "workers:2:2")
        for memory in method.estimator.memories
        if (runtime != "eager" or not batching.startswith("workers")) and (runtime != "compile" or compiled)
    ]


class Search:
    """Times ways on one batch, promising ones first.

    Args:
        build: returns the function that computes the meta-gradient in a given way.
        rest: makes everything that was built give back the memory and threads it holds. say: is told what is measured next.
        settings: batching, memory and runtime as given; "auto" leaves one open.
        memories: the estimator's memory modes.
        count: tasks T in the batch; steps: inner steps K.
        single: peak bytes of one task that keeps its states alone, from which other peaks are predicted (0: unknown).
        budget: peak bytes allowed on the device; beside: bytes of it that every way needs, for the gradients of all tasks.
        horizon: outer steps to come; ways that take long to build are tried only where they can pay.
    """

    def __init__(
        self, build: Build, settings: tuple[str, str, str], memories: Sequence[str], count: int, steps: int, single: int,
        budget: int, device: torch.device, horizon: int, rows: Iterable[Row] = (),
        clock: Callable[[], float] = time.perf_counter, rest: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None, attempt: Attempt | None = None, beside: int = 0,
    ) -> None:  # fmt: skip
        self.build, self.rest, self.say, self.clock = build, rest, say, clock
        self.attempt: Attempt = attempt or Unwatched()
        self.count, self.steps, self.single = count, steps, single
        self.budget, self.beside, self.device, self.horizon = budget, beside, device, horizon
        self.batching = None if settings[0] == "auto" else settings[0]
        # "auto" leaves "mixed" out: some of torch's functions have no forward mode, and tracing it can end the process.
        open_ = [m for m in memories if m != "mixed"]
        self.kept = open_ if settings[1] == "auto" else [settings[1]]
        self.runtimes = [r for r in RUNTIMES if settings[2] in ("auto", r)]
        self.rows = list(rows)
        self.errors: list[Exception] = []
        self.building: dict[Way, float] = {}  # seconds of the first call, which traces

    def run(self) -> Plan:
        """Tries mappings of the tasks first, then memory modes for the best mapping, and last, where it can pay, compiling."""
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
        """The two fastest traced ways, with different mappings, that could become the fastest once compiled."""
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
        left = self.budget - self.beside
        if self.single * self.count > left > self.single:
            found.append(f"vmap:{left // self.single}")
        elif runtime == "trace" and self.count >= FEW:
            found.append(f"vmap:{self.count // 4}")  # the values of so few tasks may stay in the processor's cache
        if runtime == "trace" and threads > 1 and self.count > 1:
            found += [f"workers:{threads}", f"workers:{threads}:{-(-self.count // threads)}"]
        return found

    def foretold(self, batching: str, memory: str) -> int:
        """The peak in bytes, roughly, predicted from that of one task and one step at a time."""
        how = cut(batching)
        at_once = min(self.count, (self.count if how.size is None else how.size) * how.workers)
        return self.beside + self.single * at_once * (max(1, self.steps) if memory == "graph" else 1)

    def measure(self, batching: str, memory: str, runtime: str) -> None:
        """Adds a row for this way, unless there is one already."""
        if any(row[:3] == (batching, memory, runtime) for row in self.rows):
            return
        if (expected := self.foretold(batching, memory)) > self.budget:
            self.rows.append(Row(batching, memory, runtime, None, expected, "not tried: above the memory budget"))
            return
        if self.attempt.died(way := (batching, memory, runtime)):
            self.rows.append(Row(*way, note="not tried: an earlier process ended while it tried this"))
            return
        try:
            self.rest()  # idle threads of the previous way would slow this one down (docs/log.md)
            self.say(f"measuring {batching}, {memory}, {runtime}")
            with self.attempt(way):
                run = self.build(Choice(*way))
                start = self.clock()
                run()  # traces, compiles, warms up
                self.building[way] = self.clock() - start
                self.rest()  # buffers kept from the first call would not show in the peak
                _, used = peak.of(run, self.device)
        except Exception as error:  # torch can raise anything, as for a layer without a batching rule
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
        """The fastest within the budget; if none keeps to it, the one with the lowest peak."""
        timed = [row for row in self.rows if row.seconds is not None]
        within = [row for row in timed if (row.bytes or 0) <= self.budget]
        if within:
            return min(within, key=lambda row: row.seconds or 0.0)
        return min(timed, key=lambda row: row.bytes or 0, default=None)

    def conclusion(self) -> Plan:
        """The plan that follows from the rows. Raises the first error if every way was refused."""
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
        return Plan(tuple(self.rows), Choice(*best[:3], timed, "measurement"), why)
