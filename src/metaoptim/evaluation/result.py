"""The record of an evaluation: what was measured, on what, and how certain it is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

SHOWN = (0, 1, 5, 10, 20)  # and the last one, as far as they fit
WIDEST = 120
SCORES = "scores.safetensors"
FEW = 10  # tasks, as of a table, of which it is told that more episodes make no more tasks of them


@dataclass(frozen=True)
class Row:
    """One method's scores on every episode.

    `scores` maps a metric to (E, K+1), averaged over the runs; `runs` holds the same of each run, and `seeds` each run's mean
    after the last step.
    """

    name: str
    about: str
    scores: Mapping[str, Tensor] = field(repr=False)
    seeds: tuple[Mapping[str, float], ...] = ()
    runs: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)

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

    @property
    def scores(self) -> Tensor:
        """The method's score of each episode after the last inner step, (E)."""
        return self.rows[0].scores[self.metric][:, -1]

    @property
    def of_runs(self) -> Tensor:
        """The same of each run, of which `scores` are the mean, (R, E)."""
        return torch.stack([scores[self.metric][:, -1] for scores in self.rows[0].runs])

    @property
    def beside(self) -> dict[str, tuple[float, float]]:
        """Mean and interval of each baseline, by name."""
        return {row.name: (row.mean(self.metric)[-1], row.interval(self.metric)[-1]) for row in self.rows[1:]}

    @property
    def protocol(self) -> str:
        """How it was measured: tasks, normalisation, inner steps and episodes. Scores of one protocol can be compared."""
        return self.measured(f"split {self.facts['split']}", f"{self.facts['steps']} inner steps")

    def measured(self, where: str, after: str) -> str:
        """The protocol, of scores there and after so many steps, in words."""
        facts, tasks = self.facts, self.facts["tasks"]
        options = {k: v for k, v in tasks["options"].items() if isinstance(v, str | bool | int) and v is not False}
        told = ", ".join(f"{k}={v}" if v is not True else k for k, v in sorted(options.items()))
        return (
            f"{tasks['family']}{f' ({told})' if told else ''}, {where}, {facts['normalisation']} normalisation, "
            f"{after}, {facts['episodes']} episodes of seed {facts['episode_seed']}"
        )

    def __repr__(self) -> str:
        facts, percent = self.facts, self.metric == "accuracy"
        score = f"{self.metric} {_cell(self.mean, self.interval, percent)}{' %' if percent else ''}"
        steps, episodes = plural(facts["steps"], "step"), plural(facts["episodes"], "episode")
        return f"Result({self.rows[0].name}: {score} after {steps}, {episodes})"

    def __str__(self) -> str:
        width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
        console = Console(file=io.StringIO(), width=width)
        console.print(self.table(width))
        return cast(io.StringIO, console.file).getvalue().rstrip()

    def save(self, folder: str | Path) -> Path:
        """Writes result.json, and the scores that it names: scores.safetensors; returns the path of the first.

        Those of an earlier result are replaced. A kill at any moment leaves no result.json that names scores of another one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{row.name}/{m}": x for row in self.rows for m, x in row.scores.items()}
        for row in self.rows if len(self.rows[0].runs) > 1 else ():
            tensors |= {f"{row.name}/{m}/run{i}": x for i, scores in enumerate(row.runs) for m, x in scores.items()}
        data = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        numbers = folder / "result.json"
        write_atomic(folder / SCORES, safetensors.torch.save(data), stale=numbers)
        write_atomic(numbers, f"{self.json(scores=SCORES)}\n".encode())
        return numbers

    def table(self, width: int = WIDEST) -> Table:
        """One row per method, and one column per inner step, as many as fit into so many characters."""
        last = self.facts["steps"]
        shown = [k for k in (SHOWN if last > 4 else range(last)) if k < last] + [last]
        console = Console(width=10 * WIDEST, file=io.StringIO())
        while len(shown) > 2 and console.measure(self._table(shown, titled=False)).maximum > width:
            del shown[len(shown) // 2]  # what is before, after the first and after the last step stays longest
        return self._table(shown)

    def _table(self, shown: list[int], titled: bool = True) -> Table:
        facts, percent = self.facts, self.metric == "accuracy"
        unit = "accuracy, %" if percent else "loss"
        episodes = plural(facts["episodes"], "episode")
        title = f"{facts['tasks']['family']}, split {facts['split']}: {unit} ± 95 % interval over {episodes}"
        table = Table(title=title, caption=_caption(facts)) if titled else Table()
        table.add_column("inner steps", no_wrap=True)
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

    def json(self, scores: str | None = None) -> str:
        """Everything in machine-readable form; enough to repeat the evaluation.

        scores: the file that holds the scores of single episodes; none: they stand in the JSON itself.
        """
        rows = [
            {
                "name": row.name,
                "about": row.about,
                "seeds": {
                    "count": len(row.seeds),
                    "means": {m: [s[m] for s in row.seeds] for m in row.scores} if row.seeds else {},
                    "spread": {m: _spread([s[m] for s in row.seeds]) for m in row.scores} if row.seeds else {},
                },
                **{
                    m: {
                        "mean": row.mean(m),
                        "interval": row.interval(m),
                        "episodes": f"{scores}: {row.name}/{m}" if scores else x.tolist(),
                    }
                    for m, x in row.scores.items()
                },
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
    return f"{scale * mean:{'+' if signed else ''}.{digits}f}" + ("" if isnan(half) else f" ± {scale * half:.{digits}f}")


def few_tasks(tasks: int | None) -> str:
    """What intervals don't say where episodes are of a few tasks, as those of a table; "" for many, or where None counts."""
    if tasks is None or tasks >= FEW:
        return ""
    return f"intervals are over episodes of {plural(tasks, 'task')}, not over tasks: they say nothing of another task"


def _caption(facts: Mapping[str, Any]) -> str:
    """Hashes have a line of their own, in which they are not broken."""
    seeds = plural(len(facts["seeds"]), "training seed")
    told = f"{facts['normalisation']} normalisation · checkpoint: {facts['selection']} · {seeds}"
    hashes = {"episodes": facts["episodes_sha256"], "classes": facts["tasks"].get("classes_sha256")}
    drawn = " · ".join(f"{what} {digest[:12]}" for what, digest in hashes.items() if digest)
    return "\n".join(line for line in (told, drawn, few_tasks(facts["tasks"].get("tasks"))) if line)
