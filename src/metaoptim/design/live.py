"""A page that follows training: written again whenever a run's folder has news."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from metaoptim.design.folder import OVER, RESULT
from metaoptim.runs.store import METRICS, told_state

EVERY = 1.0  # seconds between looks
WATCHED = (METRICS, "state.json", RESULT)


def follow(runs: Sequence[Path], write: Callable[[bool], None]) -> None:
    """Calls write(True) at once and at any news, until the training of each run has ended."""
    before: list[tuple[int, int] | None] = []
    while not all(told_state(run).get("status") in OVER for run in runs):
        if (now := [_look(run / name) for run in runs for name in WATCHED]) != before:
            before = now
            write(True)
        time.sleep(EVERY)


def _look(file: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
