"""The file of the ledger: one JSON line for each measurement, appended, never changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from metaoptim.ledger.entry import Entry
from metaoptim.runs import lines

FILE, LOCK = "ledger.jsonl", ".ledger.lock"


def read(folder: Path) -> list[Entry]:
    """All entries, oldest first; none where there is no ledger. A line that a kill cut short at the end is passed over."""
    return lines.read(folder / FILE, Entry, "entry of a ledger")


def append(folder: Path, entry: Entry) -> None:
    """Adds an entry as one whole line; OSError where that is impossible."""
    lines.append(folder / FILE, asdict(entry))


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
