"""What a run has logged while it was trained: metrics.jsonl, a line now and then."""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from metaoptim.runs.store import METRICS


def read(folder: Path) -> list[dict[str, Any]]:
    """The records, each with its step, in their order; without lines that can't be read, and none where there is no file."""
    found = []
    with suppress(OSError):
        for line in (folder / METRICS).read_bytes().splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    found.append(record)
    return found


def pace(folder: Path) -> float | None:
    """Seconds of an outer step, by the median of those that were logged; None where there are none."""
    seconds = [line["seconds"] for line in read(folder) if "seconds" in line]
    return max(statistics.median(seconds), 1e-9) if seconds else None


def elapsed(folder: Path) -> float:
    """Seconds that the training has taken up to the last line, over all the times that it was resumed.

    A run of a version that did not log them: its steps at their pace, without validations.
    """
    lines = read(folder)
    known = lines[-1].get("elapsed") if lines else 0.0
    return lines[-1]["step"] * (pace(folder) or 0.0) if known is None else float(known)


def validations(folder: Path) -> list[dict[str, Any]]:
    """The validations: `step`, `seconds` since training began, and the scores by their metric."""
    each = pace(folder) or 0.0
    return [
        {"step": line["step"], "seconds": line.get("elapsed", line["step"] * each)}
        | {name.removeprefix("val_"): x for name, x in line.items() if name.startswith("val_")}
        for line in read(folder)
        if any(name.startswith("val_") for name in line)
    ]
