"""What was tried and what came of it: one JSON line for each training that was judged, whichever command has run it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

import metaoptim
from metaoptim.runs import lines

FILE = "trials.jsonl"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version() -> str:
    return str(metaoptim.__version__)


@dataclass(frozen=True)
class Trial:
    """One recipe, trained with one seed and judged.

    Args:
        recipe: its name.
        tables: what it says of training and evaluation, `Recipe.content`: without the seed and without where data lie.
        metric: "accuracy", of which more is better, or "loss", of which less is.
        value: the mean after the last of `steps` inner steps over `episodes` episodes (None: not finite, as where it diverged).
        interval: half the width of its 95 % interval (None: not known).
        seed: of the training.
        split: what it was judged on, as "test", or "val" for a fold of the training split.
        steps, episodes: inner steps K and episodes E at judging.
        iterations, tasks_per_step: outer steps, and tasks T in each.
        seconds: what the training took (None: not known).
        protocol: what it was judged on and how, in words; values of one protocol can be compared.
        source: the command that has tried it.
        date: when, as in 2026-01-31T12:00:00+00:00.
        version: of metaoptim.
    """

    recipe: str
    tables: Mapping[str, Any] = field(repr=False)
    metric: str
    value: float | None
    interval: float | None
    seed: int
    split: str
    steps: int
    episodes: int
    iterations: int
    tasks_per_step: int
    seconds: float | None
    protocol: str
    source: Literal["compare", "tune", "reproduce"]
    date: str = field(default_factory=_now)
    version: str = field(default_factory=_version)

    @property
    def finite(self) -> bool:
        """Whether it has a value that can be compared."""
        return self.value is not None and math.isfinite(self.value)


def append(path: str | Path, trial: Trial) -> None:
    """Adds a trial to a file, or to trials.jsonl in a folder, which is made; several processes may do so at once.

    OSError where that is impossible.
    """
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        lines.append(file, asdict(trial))


def read(path: str | Path) -> list[Trial]:
    """All trials of a file, or of trials.jsonl in a folder, oldest first; none where there is no such file.

    ValueError for a line that is no trial.
    """
    return lines.read(_file(path), Trial, "trial")


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / FILE
