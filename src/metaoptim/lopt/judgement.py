"""The record of a judgement of learned optimizers: curves, ratios to the best baseline, and time."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaoptim.lopt.trained import final
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

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
        of_runs: of each of M meta-training runs, over which `losses` are averaged, final losses, (M, R); the learned rule's.
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
    of_runs: Tensor | None = field(default=None, repr=False)

    @property
    def finals(self) -> Tensor:
        """The mean loss over the last tenth of the steps of each run, (R)."""
        return final(self.losses)

    @property
    def final(self) -> float:
        """Its mean over the runs."""
        return self.finals.mean().item()

    @property
    def by_run(self) -> list[float]:
        """The mean final loss of each meta-training run."""
        return [] if self.of_runs is None else [x.mean().item() for x in self.of_runs]

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

    @property
    def learned(self) -> list[Row]:
        """The learned rule's row of each family."""
        return [row for row in self.rows if row.name == self.name]

    @property
    def metric(self) -> str:
        """What `mean` is one of: the final loss, of which less is better."""
        return "loss"

    @property
    def mean(self) -> float:
        """The learned rule's mean final loss; all families count the same."""
        return _over_families(self.learned)[0]

    @property
    def interval(self) -> float:
        """Half the width of its 95 % interval over problems."""
        return _over_families(self.learned)[1]

    @property
    def scores(self) -> Tensor:
        """The learned rule's final loss on each problem, family by family: the same problems for every rule."""
        return torch.cat([row.finals for row in self.learned])

    @property
    def of_runs(self) -> Tensor:
        """The same of each run of meta-training, of which `scores` are the mean, (M, E)."""
        found = [self.scores[None] if row.of_runs is None else row.of_runs for row in self.learned]
        return torch.cat(found, 1)

    @property
    def beside(self) -> dict[str, tuple[float, float]]:
        """Mean and interval of each baseline, by name."""
        others = dict.fromkeys(row.name for row in self.rows if row.name != self.name)
        return {n: _over_families([row for row in self.rows if row.name == n]) for n in others}

    @property
    def protocol(self) -> str:
        """What it was measured on. Losses of one protocol can be compared."""
        facts = self.facts
        families = ", ".join(f"{n} ({row.losses.shape[1] - 1} steps)" for n, (row, *_) in self.families.items())
        return (
            f"training problems {families}, split {facts['split']}, mean loss over the last tenth of a run, "
            f"{facts['problems']} problems of each of the seeds {', '.join(map(str, facts['seeds']))}"
        )

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

    def table(self, width: int = WIDTH) -> Table:
        """A row for each rule on each family."""
        runs, facts, trained = len(self.rows[0].losses), self.facts, len(self.rows[0].by_run)
        tried = f"{facts['step_sizes']} step size{'' if facts['step_sizes'] == 1 else 's'}"
        caption = (
            f"{runs} runs on fresh problems; losses in units of knowing nothing, in brackets over the best baseline's; "
            f"baselines tuned over {tried} on other problems (*: the best was the first or the last "
            "one); steps and seconds until the best baseline's final loss"
            + (f"; the mean over {trained} runs of meta-training" if trained > 1 else "")
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

    __repr__ = __str__

    def json(self) -> dict[str, Any]:
        """All of it in JSON's types: what was measured, the final loss of each run, and quantiles of the curves."""
        rows = [
            {
                "family": row.family, "name": row.name, "rule": row.rule, "lr": None if row.lr != row.lr else row.lr,
                "warmup": row.warmup, "edge": row.edge, "runs": len(row.losses), **self.measured(row),
                "finals": row.finals.tolist(), "by_run": row.by_run,
                "curve": {str(q): c for q, c in zip(QUANTILES, row.quantiles.tolist(), strict=True)},
            }
            for row in self.rows
        ]  # fmt: skip
        told = {"metric": self.metric, "mean": self.mean, "interval": self.interval}
        return {"name": self.name, **told, "rows": rows, "facts": dict(self.facts)}

    def save(self, folder: str | Path) -> Path:
        """Writes result.json into a folder; returns its path."""
        path = Path(folder) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{strict_json(self.json(), indent=2)}\n".encode())
        return path

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: loss against steps for each family, medians with bands from the first to the ninth decile."""
        from metaoptim.report.optimizers import draw  # here, because matplotlib is slow to load

        draw(self, Path(path))


def _over_families(rows: list[Row]) -> tuple[float, float]:
    """The mean of the families' mean final losses, and half its 95 % interval over problems (NaN for one of a family)."""
    variance = sum(row.finals.double().var().item() / len(row.finals) for row in rows) if len(rows[0].finals) > 1 else math.nan
    return sum(row.final for row in rows) / len(rows), 1.96 * math.sqrt(variance) / len(rows)
