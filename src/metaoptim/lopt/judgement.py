"""The record of a judgement of learned optimizers: curves, ratios to the best baseline, and time."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaoptim.lopt.baselines import final

QUANTILES = (0.1, 0.5, 0.9)
WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One rule on one family.

    Args:
        family, name, rule: of what; the rule in words.
        lr, warmup, edge: what was tuned (not a number: nothing was), and whether lr was the first or the last of the sweep.
        losses: judged losses after 0 … K steps of R runs, (R, K+1), in units of knowing nothing.
        diverged: the share of runs that have diverged at the end.
        seconds: of a training step of one problem.
    """

    family: str
    name: str
    rule: str
    lr: float
    warmup: int
    edge: bool
    losses: Tensor = field(repr=False)
    diverged: float
    seconds: float

    @property
    def final(self) -> float:
        """The mean loss over the last tenth of the steps."""
        return final(self.losses).mean().item()

    @property
    def area(self) -> float:
        """The mean loss over all steps, the start left out."""
        return self.losses[:, 1:].mean().item()

    @property
    def quantiles(self) -> Tensor:
        """Over the runs, of the loss after 0 … K steps, (3, K+1)."""
        return torch.quantile(self.losses.double(), self.losses.new_tensor(QUANTILES, dtype=torch.float64), 0)

    def steps_to(self, loss: float) -> int | None:
        """The first step at which the mean loss is as low; None: never."""
        reached = (self.losses.mean(0) <= loss).nonzero().flatten()
        return int(reached[0]) if len(reached) else None


@dataclass(frozen=True)
class Judgement:
    """Rows family by family, the learned rule's first; `name` is what it is called; `facts` say what was measured on what."""

    rows: tuple[Row, ...]
    name: str
    facts: Mapping[str, Any]

    @property
    def families(self) -> dict[str, list[Row]]:
        """The rows of each family."""
        return {n: [row for row in self.rows if row.family == n] for n in dict.fromkeys(row.family for row in self.rows)}

    def best(self, family: str) -> Row:
        """The baseline with the lowest final loss."""
        return min((row for row in self.families[family] if row.name != self.name), key=lambda row: row.final)

    def measured(self, row: Row) -> dict[str, Any]:
        """What a row comes to, relative to the best tuned baseline of its family.

        `final` and `area` are losses; `final_ratio` and `area_ratio` those over the baselines' lowest; `steps` and `seconds`
        until the mean loss is as low as the final one of the best baseline (None: never).
        """
        others = [other for other in self.families[row.family] if other.name != self.name]
        steps = row.steps_to(self.best(row.family).final)
        return {
            "final": row.final,
            "final_ratio": row.final / min(other.final for other in others),
            "area": row.area,
            "area_ratio": row.area / min(other.area for other in others),
            "steps": steps,
            "seconds": None if steps is None else steps * row.seconds,
            "seconds_per_step": row.seconds,
            "diverged": row.diverged,
        }

    def table(self) -> Table:
        """A row for each rule on each family."""
        runs, facts = len(self.rows[0].losses), self.facts
        caption = (
            f"{runs} runs on fresh problems; losses in units of knowing nothing, in brackets over the best baseline's; "
            f"baselines tuned over {facts['step_sizes']} step sizes on other problems (*: the best was the first or the last "
            "one); steps and seconds until the best baseline's final loss"
        )
        table = Table(title=f"{self.name} against tuned baselines", caption=caption)
        for column in ("family", "rule"):
            table.add_column(column)
        for column in ("step size", "final loss", "mean loss", "steps", "seconds", "diverged"):
            table.add_column(column, justify="right", no_wrap=True)
        for family, rows in self.families.items():
            for i, row in enumerate(rows):
                m = self.measured(row)
                size = "" if row.lr != row.lr else f"{row.lr:.2g}{'*' if row.edge else ''}"
                table.add_row(
                    "" if i else family, row.name, size, f"{m['final']:.3f} ({m['final_ratio']:.2f})",
                    f"{m['area']:.3f} ({m['area_ratio']:.2f})", "never" if m["steps"] is None else str(m["steps"]),
                    "never" if m["seconds"] is None else f"{m['seconds']:.2g}", f"{100 * m['diverged']:.0f} %",
                    end_section=i == len(rows) - 1,
                )  # fmt: skip
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(self.table())
        return cast(io.StringIO, console.file).getvalue().rstrip()

    def json(self) -> dict[str, Any]:
        """All of it in JSON's types: what was measured, and quantiles of the curves."""
        rows = [
            {
                "family": row.family, "name": row.name, "rule": row.rule, "lr": None if row.lr != row.lr else row.lr,
                "warmup": row.warmup, "edge": row.edge, "runs": len(row.losses), **self.measured(row),
                "curve": {str(q): c for q, c in zip(QUANTILES, row.quantiles.tolist(), strict=True)},
            }
            for row in self.rows
        ]  # fmt: skip
        return {"name": self.name, "rows": rows, "facts": dict(self.facts)}

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: loss against steps for each family, medians with bands from the first to the ninth decile."""
        from metaoptim.report.optimizers import draw  # here, because matplotlib is slow to load

        draw(self, Path(path))
