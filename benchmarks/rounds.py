"""Times several ways of the same work in rounds, all of them in every round, so that a machine's moods hit all alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shared import CONSOLE

SLICE = 0.05  # seconds: what is quicker is called several times in a row, and the mean taken
SLOW = 5.0  # seconds: what is slower is left out after the first rounds
FEW = 3
WARM = 1.0  # seconds
PAUSE = 0.01  # seconds between two ways, in which the threads of the one before stop spinning


@dataclass
class Contender:
    """A way: `run(calls, index)` returns the seconds of so many calls on a batch; what is found out is added.

    rest: ends what would slow down the others, such as threads; such a way runs once before it is timed.
    """

    name: str
    run: Callable[[int, int], float]
    rest: Callable[[], None] | None = None
    first: float = math.nan
    error: float = math.nan
    note: str = ""
    calls: int = 1
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds.values()) if self.seconds else math.nan


def timed(call: Callable[[int], object]) -> Callable[[int, int], float]:
    """A contender's `run` from a function of the batch's index; where there is an accelerator, until it is done."""

    def run(calls: int, index: int) -> float:
        _wait()
        start = time.perf_counter()
        for _ in range(calls):
            call(index)
        _wait()
        return time.perf_counter() - start

    return run


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure(contenders: Sequence[Contender], rounds: int, batches: int, title: str) -> None:
    """Times every contender once in each round, in an order drawn anew; what has been measured stays after Ctrl-C."""
    for one in contenders:
        once = _warmed(one)
        one.calls = max(1, math.ceil(SLICE / max(once, 1e-6)))
    order, draw = list(contenders), random.Random(0)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as bar:
        for turn in bar.track(range(rounds)):
            draw.shuffle(order)
            for one in order:
                if turn >= FEW and one.median > SLOW:
                    continue
                time.sleep(PAUSE)
                one.seconds[turn] = _run(one, one.calls, turn % batches) / one.calls


def _warmed(one: Contender) -> float:
    """Seconds of a warm call. The first calls of a way that `auto` chose are held to the plain loop, ever more rarely."""
    start, once = time.perf_counter(), math.inf
    while once == math.inf or time.perf_counter() - start < WARM:
        once = min(once, _run(one, 1, 0))
    return once


def _run(one: Contender, calls: int, index: int) -> float:
    if one.rest is None:
        return one.run(calls, index)
    one.run(1, index)
    seconds = one.run(calls, index)
    one.rest()
    return seconds


def ratios(base: Contender, other: Contender) -> list[float]:
    """base ÷ other of every round in which both ran: how many times faster the other is."""
    return [base.seconds[r] / s for r, s in other.seconds.items() if r in base.seconds]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (math.nan,) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
