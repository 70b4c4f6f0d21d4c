"""What the user sees while training runs: a progress bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

QUIET_SECONDS = 20.0


def _console() -> Console:
    # The stream itself is asked: with FORCE_COLOR, rich would take a pipe for a terminal and send it control codes.
    return Console(stderr=True, force_terminal=sys.stderr.isatty())


class Reporter:
    """Shows loss, accuracy, steps/s and time left; `with Reporter(total, done, enabled) as report`."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self.console = _console()
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not (enabled and self.console.is_terminal), refresh_per_second=4,
        )  # fmt: skip
        self.enabled = enabled
        self.total, self.done, self.rate = total, done, 0.0
        self.spoken = self.last = time.monotonic()
        self.smooth: dict[str, float] = {}
        self.task = self.bar.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def busy(self, text: str) -> None:
        """Shows what is going on before the first step."""
        self.bar.update(self.task, text=text)
        if self.enabled and not self.console.is_terminal and time.monotonic() - self.spoken > QUIET_SECONDS:
            self.spoken = time.monotonic()
            self.say(text)

    def advanced(self, record: Mapping[str, Any]) -> None:
        """Reports that an outer step is done."""
        now = time.monotonic()
        seconds, self.last = max(now - self.last, 1e-9), now
        self.done = record["step"]
        for name, value in (("loss", record["loss"]), ("accuracy", record.get("accuracy")), ("seconds", seconds)):
            if value is not None:
                self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value
        text = f"loss {self.smooth['loss']:.4f}"
        if "accuracy" in self.smooth:
            text += f"  accuracy {100 * self.smooth['accuracy']:.1f} %"
        text += f"  {1 / self.smooth['seconds']:.2f} steps/s"
        self.bar.update(self.task, completed=self.done, text=text)
        if self.enabled and not self.console.is_terminal and (now - self.spoken > QUIET_SECONDS or self.done == self.total):
            self.spoken = now
            left = (self.total - self.done) * self.smooth["seconds"]
            self.say(f"step {self.done}/{self.total}  {text}  {left:.0f} s left")

    def validated(self, step: int, scores: Mapping[str, float], improved: bool) -> None:
        """Reports that a validation is done."""
        score = f"accuracy {100 * scores['accuracy']:.2f} %" if "accuracy" in scores else f"loss {scores['loss']:.4f}"
        self.say(f"step {step}: validation {score}{'  (best so far)' if improved else ''}")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if self.enabled:
            self.console.print(text, highlight=False)


def tracked(items: Sequence[int], description: str, enabled: bool) -> Iterable[int]:
    """The items, with a progress bar on a terminal."""
    console = _console()
    return track(items, description, console=console, disable=not (enabled and console.is_terminal))
