"""The file of the ledger: one JSON line for each measurement, appended, never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from metaoptim.ledger.entry import Entry
from metaoptim.runs.checkpoint import strict_json

FILE, LOCK = "ledger.jsonl", ".ledger.lock"


def read(folder: Path) -> list[Entry]:
    """All entries, oldest first; none where there is no ledger. A line that a kill cut short at the end is passed over."""
    file = folder / FILE
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Line {number} of {file} is no entry of a ledger ({error}); mend it, or take it out.") from error
    return entries


def append(folder: Path, entry: Entry) -> None:
    """Adds an entry as one whole line; OSError where that is impossible."""
    file = folder / FILE
    line = f"{strict_json(asdict(entry), sort_keys=True)}\n".encode()
    with file.open("ab+") as opened:
        opened.seek(0)
        written = opened.read()
        opened.truncate(written.rfind(b"\n") + 1)  # what a kill left of a line
        opened.write(line)
        opened.flush()
        os.fsync(opened.fileno())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to the ledger of that folder; ValueError where one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process writes to the ledger in {folder}; wait for it, or choose another --out.") from None
    try:
        yield
    finally:
        lock.release()
