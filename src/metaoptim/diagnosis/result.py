"""What a diagnosis found: for each question its numbers, and one sentence that follows from them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

WIDTH = 120
FILE = "diagnosis.json"


@dataclass(frozen=True)
class Reading:
    """One question: its numbers in JSON types, and the sentence that follows from them."""

    name: str
    sentence: str
    numbers: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Diagnosis:
    """The readings in their order, why others are left out, and the facts that give the numbers their meaning.

    `diagnosis["gain"]` is the reading of that name; `for reading in diagnosis` goes through all; `print(diagnosis)` shows their
    sentences.
    """

    readings: tuple[Reading, ...]
    left_out: Mapping[str, str]
    facts: Mapping[str, Any] = field(repr=False)

    def __iter__(self) -> Iterator[Reading]:
        return iter(self.readings)

    def __getitem__(self, name: str) -> Reading:
        for reading in self.readings:
            if reading.name == name:
                return reading
        reason = self.left_out.get(name)
        known = ", ".join(reading.name for reading in self.readings)
        raise KeyError(f"{name} was left out: {reason}" if reason else f"there is no reading `{name}`; there are {known}")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(self.table())
        return cast(io.StringIO, console.file).getvalue().rstrip()

    def table(self) -> Table:
        """A row for every question."""
        facts = self.facts
        table = Table(
            title=f"{facts['algorithm']} on {facts['tasks']['family']}, split {facts['split']}",
            caption=f"scores: {facts['episodes']} episodes; states, gradients, features: the first {facts['closely']}",
        )
        table.add_column("reading", no_wrap=True)
        table.add_column("what it says")
        for reading in self.readings:
            table.add_row(reading.name, Text(reading.sentence))
        for name, reason in self.left_out.items():
            table.add_row(name, Text(f"left out: {reason}"))
        return table

    def json(self) -> str:
        """Everything, for machines."""
        found = {r.name: {"sentence": r.sentence, "numbers": dict(r.numbers)} for r in self.readings}
        return strict_json({"readings": found, "left_out": dict(self.left_out), "facts": dict(self.facts)}, indent=2)

    def save(self, folder: str | Path) -> Path:
        """Writes diagnosis.json; returns its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{self.json()}\n".encode())
        return path
