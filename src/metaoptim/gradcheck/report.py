"""What a check found: a row per execution mode and per tensor, faults, notes, and a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metaoptim.gradcheck.differences import EXACT, TOLERANCE
from metaoptim.runs.checkpoint import strict_json

SHOWN = 24  # tensors in the table, the worst ones


@dataclass(frozen=True)
class Row:
    """A gradient: its error against what it claims to be, with the largest that is none, and its relative distance from the
    first mode's gradient (none: not taken)."""

    name: str
    error: float | None
    distance: float | None = None
    refused: str = ""
    limit: float = TOLERANCE

    @property
    def verdict(self) -> Literal["right", "off", "refused"]:
        if self.refused:
            return "refused"
        apart = self.distance is not None and not self.distance <= EXACT
        return "off" if apart or (self.error is not None and not self.error <= self.limit) else "right"


@dataclass(frozen=True, repr=False)
class Report:
    """`ok`: at least one mode is right and none is off, and no fault was found elsewhere. `print(report)` says it in words."""

    name: str
    claim: str
    modes: tuple[Row, ...]
    tensors: tuple[Row, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        verdicts = {row.verdict for row in (*self.modes, *self.tensors)}
        return not self.faults and "off" not in verdicts and any(row.verdict == "right" for row in self.modes)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.modes:
            return f"not checked: {self.name}, {self.claim}: there is nothing to hold it to."
        right = [row for row in self.modes if row.verdict == "right"]
        if self.ok:
            worst = max(row.error or 0.0 for row in (*right, *self.tensors))
            ways = f"{len(right)} execution modes agree" if len(right) > 1 else "it agrees"
            if any(row.limit != TOLERANCE for row in right):
                return f"right: {self.name}, {self.claim}: {ways} with the exact gradient to {worst:.1f} of them."
            return f"right: {self.name}, {self.claim}: {ways} with central differences to {worst:.0e}."
        off = [row for row in self.modes if row.verdict == "off"]
        what = f"{len(off)} of {len(self.modes)} execution modes are off" if off else "see below"
        return f"wrong: {self.name}, {self.claim}: {what if right or off else 'every execution mode is refused'}."

    def table(self) -> RenderableType:
        """The modes, the tensors, and what was found."""
        modes = Table("execution mode", title=f"{self.name}: {self.claim}, relative errors in float64")
        tensors = Table("tensor")
        for table, heads in (
            (modes, ("central differences", "first mode", "verdict")),
            (tensors, ("central differences", "verdict")),
        ):
            for head in heads:
                table.add_column(head, justify="left" if head == "verdict" else "right", no_wrap=head != "verdict")
        for row in self.modes:
            modes.add_row(row.name, _number(row.error), _number(row.distance), row.verdict)
        worst = sorted(self.tensors, key=lambda row: -(row.error or 0.0))[:SHOWN]
        for row in (row for row in self.tensors if row in worst):
            tensors.add_row(row.name, _number(row.error), row.verdict)
        parts: list[RenderableType] = [modes, *([tensors] if worst else [])]
        if len(worst) < len(self.tensors):
            parts.append(Text(f"{len(self.tensors) - len(worst)} more tensors agree at least as well."))
        return Group(*parts, Text(str(self)))

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"- {line}" for line in (*self.faults, *self.notes))])

    __repr__ = __str__

    def json(self) -> str:
        """Everything, for machines."""
        rows = {part: [asdict(row) | {"verdict": row.verdict} for row in getattr(self, part)] for part in ("modes", "tensors")}
        facts = {"ok": self.ok, "verdict": self.verdict, "name": self.name, "claim": self.claim}
        return strict_json(facts | rows | {"faults": list(self.faults), "notes": list(self.notes)}, indent=2)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.0e}"
