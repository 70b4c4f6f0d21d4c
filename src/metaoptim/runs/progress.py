"""What the user sees while training runs: a progress bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)

QUIET_SECONDS = 20.0


def _console() -> Console:
    # The stream itself is asked: with FORCE_COLOR, rich would take a pipe for a terminal and send it control codes.
    return Console(stderr=True, force_terminal=sys.stderr.isatty())


class Pace:
    """What outer steps and validations take, and so how long is left.

    The first step is not counted, because it plans and traces. Until a validation was seen, one is taken to cost as much as
    half the training on as many tasks.
    """

    def __init__(self, total: int, validations: int, share: float, clock: Callable[[], float]) -> None:
        self.total, self.validations, self.share, self.clock = total, validations, share, clock
        self.began: float | None = None
        self.steps = self.judged = 0
        self.judging = 0.0

    def step(self) -> None:
        """An outer step is done."""
        if self.began is None:
            self.began, self.judging, self.judged = self.clock(), 0.0, 0
        else:
            self.steps += 1

    def validated(self, seconds: float) -> None:
        """A validation is done."""
        self.judging += seconds
        self.judged += 1

    @property
    def seconds(self) -> float | None:
        """Of an outer step; None before one was seen."""
        if self.began is None or not self.steps:
            return None
        return max(self.clock() - self.began - self.judging, 1e-9) / self.steps

    def left(self, done: int, validations: int) -> float | None:
        """Seconds to go after so many steps and validations."""
        if self.seconds is None:
            return None
        each = self.judging / self.judged if self.judged else self.share * self.seconds / 2
        return (self.total - done) * self.seconds + max(0, self.validations - validations) * each


class Reporter:
    """Shows running means of loss and accuracy, steps/s and time left; `with Reporter(total, done, enabled) as report`.

    Args:
        total, done: outer steps altogether, and those that are done.
        enabled: whether to show anything.
        every: outer steps between validations; 0: there are none. share: episodes in one, relative to the tasks in a step.
    """

    def __init__(
        self, total: int, done: int, enabled: bool, every: int = 0, share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.console, self.clock = _console(), clock
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=self.console, disable=not (enabled and self.console.is_terminal), refresh_per_second=4,
        )  # fmt: skip
        self.enabled, self.total, self.done, self.every = enabled, total, done, every
        self.pace = Pace(total, -(-total // every) if every else 0, share, clock)
        self.spoken = clock()
        self.smooth: dict[str, float] = {}
        self.task = self.bar.add_task("train", total=total, completed=done, text="", left="")

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def busy(self, text: str) -> None:
        """Shows what is going on beside the steps: planning, validation."""
        self.bar.update(self.task, text=text)
        if self.quiet():
            self.say(text)

    def quiet(self) -> bool:
        """Whether a line is due, where there is no bar."""
        due = self.enabled and not self.console.is_terminal and self.clock() - self.spoken > QUIET_SECONDS
        self.spoken = self.clock() if due else self.spoken
        return due

    @property
    def left(self) -> float | None:
        """Seconds to go, validations among them; None before it can be known."""
        return self.pace.left(self.done, self.done // self.every + (self.done == self.total) if self.every else 0)

    def advanced(self, record: Mapping[str, Any]) -> None:
        """Reports that an outer step is done."""
        self.done = record["step"]
        self.pace.step()
        for name, value in (("loss", record["loss"]), ("accuracy", record.get("accuracy"))):
            if value is not None:
                self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value
        text = f"loss {self.smooth['loss']:.4f}"
        if "accuracy" in self.smooth:
            text += f"  accuracy {100 * self.smooth['accuracy']:.1f} %"
        text += " (running mean)"
        for name in ("diverged", "discarded"):
            if record.get(name):
                text += f"  {name} {100 * record[name]:.1f} %"
        text += f"  {1 / (self.pace.seconds or record['seconds']):.2f} steps/s"
        left = "" if self.left is None else f"{timedelta(seconds=round(self.left))} left"
        self.bar.update(self.task, completed=self.done, text=text, left=left)
        last = self.enabled and not self.console.is_terminal and self.done == self.total
        if self.quiet() or last:
            self.say(f"step {self.done}/{self.total}  {text}  {left}".rstrip())

    @contextmanager
    def validating(self, episodes: int) -> Iterator[None]:
        """Around a validation."""
        self.busy(f"validating on {episodes} episodes")
        started = self.clock()
        yield
        self.pace.validated(self.clock() - started)

    def validated(self, step: int, scores: Mapping[str, float], improved: bool) -> None:
        """Reports that a validation is done."""
        score = f"accuracy {100 * scores['accuracy']:.2f} %" if "accuracy" in scores else f"loss {scores['loss']:.4f}"
        self.say(f"step {step}: validation {score}{'  (best so far)' if improved else ''}")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if self.enabled:
            self.console.print(text, highlight=False)


def say(text: str, enabled: bool) -> None:
    """Prints a line of its own, such as which of several trainings begins."""
    if enabled:
        _console().print(text, highlight=False, markup=False, soft_wrap=True)


def tracked(
    items: Sequence[int], description: str, enabled: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[int]:
    """The items, with a progress bar on a terminal, and a line now and then elsewhere."""
    console = _console()
    if not enabled or console.is_terminal:
        yield from track(items, description, console=console, disable=not enabled)
        return
    spoken = began = clock()
    for done, item in enumerate(items):
        if done and clock() - spoken > QUIET_SECONDS:
            spoken = clock()
            left = timedelta(seconds=round((spoken - began) / done * (len(items) - done)))
            say(f"{description}: {done} of {len(items)} done  {left} left", enabled)
        yield item
