"""The record of an evaluation: what was measured, on what, and how certain it is."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaoptim.runs.checkpoint import strict_json

SHOWN = (0, 1, 5, 10, 20)  # with the last one, as many columns as fit in 100 characters


@dataclass(frozen=True)
class Row:
    """One method's scores on every episode: `scores` maps a metric to (E, K+1); `seeds` holds each run's means."""

    name: str
    about: str
    scores: Mapping[str, Tensor] = field(repr=False)
    seeds: tuple[Mapping[str, float], ...] = ()

    def mean(self, metric: str) -> list[float]:
        """The mean over episodes after 0 … K steps."""
        mean: list[float] = self.scores[metric].double().mean(0).tolist()
        return mean

    def interval(self, metric: str) -> list[float]:
        """Half the width of the 95 % interval over episodes: 1.96 · s / √E."""
        return _half(self.scores[metric])

    def paired(self, other: Row, metric: str) -> tuple[float, float]:
        """The mean of this row minus another, episode by episode, after each one's last step; and half its 95 % interval."""
        gap = self.scores[metric][:, -1:].double() - other.scores[metric][:, -1:].double()
        return gap.mean().item(), _half(gap)[0]


@dataclass(frozen=True)
class Result:
    """The method's row first, then the baselines', and the facts that give the numbers their meaning."""

    rows: tuple[Row, ...]
    facts: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """ "accuracy" (a fraction) if the tasks have classes, else "loss"."""
        return "accuracy" if "accuracy" in self.rows[0].scores else "loss"

    @property
    def mean(self) -> float:
        """The method's mean score after the last inner step."""
        return self.rows[0].mean(self.metric)[-1]

    @property
    def interval(self) -> float:
        """Half the width of its 95 % interval over episodes."""
        return self.rows[0].interval(self.metric)[-1]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        return cast(io.StringIO, console.file).getvalue().rstrip()

    def table(self) -> Table:
        """One row per method, one column per inner step."""
        facts, percent = self.facts, self.metric == "accuracy"
        unit = "accuracy, %" if percent else "loss"
        steps = facts["steps"]
        shown = [k for k in (SHOWN if steps > 4 else range(steps)) if k < steps] + [steps]
        title = f"{facts['tasks']['family']}, split {facts['split']}: {unit} ± 95 % interval over {facts['episodes']} episodes"
        table = Table(title=title, caption=_caption(facts))
        table.add_column("inner steps")
        for k in shown:
            table.add_column(str(k), justify="right", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
        for row in self.rows:
            mean, half = row.mean(self.metric), row.interval(self.metric)
            constant = len(mean) == 1
            cells = [_cell(mean[0 if constant else k], half[0 if constant else k], percent) for k in shown]
            gap = "" if row is self.rows[0] else _cell(*row.paired(self.rows[0], self.metric), percent, signed=True)
            table.add_row(row.name, *cells, gap)
        return table

    def json(self) -> str:
        """Everything in machine-readable form; enough to repeat the evaluation."""
        rows = [
            {
                "name": row.name,
                "about": row.about,
                "seeds": {
                    "count": len(row.seeds),
                    "means": {m: [s[m] for s in row.seeds] for m in row.scores} if row.seeds else {},
                    "spread": {m: _spread([s[m] for s in row.seeds]) for m in row.scores} if row.seeds else {},
                },
                **{m: {"mean": row.mean(m), "interval": row.interval(m)} for m in row.scores},
                **(
                    {"against_first": dict(zip(("mean", "interval"), row.paired(self.rows[0], self.metric), strict=True))}
                    if row is not self.rows[0]
                    else {}
                ),
            }
            for row in self.rows
        ]
        return strict_json(
            {"metric": self.metric, "mean": self.mean, "interval": self.interval, **self.facts, "rows": rows}, indent=2
        )


def _half(x: Tensor) -> list[float]:
    if x.shape[0] < 2:
        return [float("nan")] * x.shape[1]
    half: list[float] = (1.96 * x.double().std(0) / x.shape[0] ** 0.5).tolist()
    return half


def _spread(values: list[float]) -> float | None:
    """The standard deviation over seeds; None for fewer than two."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None


def _cell(mean: float, half: float, percent: bool, signed: bool = False) -> str:
    scale, digits = (100, 2) if percent else (1, 3)
    return f"{scale * mean:{'+' if signed else ''}.{digits}f} ± {scale * half:.{digits}f}"


def _caption(facts: Mapping[str, Any]) -> str:
    seeds = facts["seeds"]
    return (
        f"{facts['normalisation']} normalisation · checkpoint: {facts['selection']} · {len(seeds)} training "
        f"seed{'s' if len(seeds) > 1 else ''} · episodes {facts['episodes_sha256'][:12]} · classes "
        f"{facts['tasks'].get('classes_sha256', 'none')[:12]}"
    )
