"""Files of JSON lines that records are appended to, each as one whole line, and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from metaoptim.runs.checkpoint import strict_json

Record = TypeVar("Record")


def read(file: Path, make: Callable[..., Record], what: str) -> list[Record]:
    """All records, oldest first, made of their fields; none where there is no file.

    A line that a kill cut short at the end is passed over. ValueError for any other that is none: what it should be, in words.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            records.append(make(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Line {number} of {file} is no {what} ({error}); mend it, or take it out.") from error
    return records


def append(file: Path, fields: dict[str, Any]) -> None:
    """Adds a record as one whole line, in place of what a kill left of the last one; OSError where that is impossible."""
    line = f"{strict_json(fields, sort_keys=True)}\n".encode()
    with file.open("ab+") as opened:
        opened.seek(0)
        written = opened.read()
        opened.truncate(written.rfind(b"\n") + 1)
        opened.write(line)
        opened.flush()
        os.fsync(opened.fileno())
