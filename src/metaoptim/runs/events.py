"""Numbers for TensorBoard: written at once and without a thread, whose failures nobody could catch."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metaoptim.core.callers import warn

_COUNT = itertools.count()


class Events:
    """An event file in a folder. Where it can't be written, a warning says so once, and nothing more is written.

    purge: steps from this one on, which an earlier file holds, are forgotten.
    """

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        self.folder, self.purge = folder, purge
        self.path: Path | None = None
        self.broken = False

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers by name."""
        if self.broken:
            return
        try:
            self._append(step, numbers)
        except OSError as error:
            self.broken = True
            warn(
                f"TensorBoard's events can't be written in {self.folder} ({error.strerror or error}): training goes on without "
                "them, for metrics.jsonl holds the same numbers"
            )

    def _append(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # here, because they take a while to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))
        first = [] if self.path else list(self._header(event_pb2))
        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
            self.path = self.folder / name
        with open(self.path, "ab") as file:
            for record in (*first, event):
                RecordWriter(file).write(record.SerializeToString())

    def _header(self, events: Any) -> Iterator[Any]:
        """What a file begins with."""
        yield events.Event(wall_time=time.time(), file_version="brain.Event:2")
        if self.purge is not None:
            begins = events.SessionLog(status=events.SessionLog.START)
            yield events.Event(wall_time=time.time(), step=self.purge, session_log=begins)
