"""What Ctrl-C does while modules are imported; this file imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130


@contextmanager
def quitting() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once. An exception would get lost in an import, or leave a module half made."""
    try:
        before = signal.signal(signal.SIGINT, _quit)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quit(number: int, frame: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
