"""The record of a comparison: methods from best to worst, their pairs, what they cost, and where it all comes from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table

from metaoptim.core.brief import plural
from metaoptim.design import statistics
from metaoptim.design.statistics import Interval, Pair, Scores
from metaoptim.evaluation.result import few_tasks
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

FILE, SCORES, PICTURE = "comparison.json", "scores.safetensors", "comparison.png"
FORMAT = 1
WIDTH, NARROW = 120, 90
ENOUGH = 10  # seeds, over which a bootstrap interval is about as long as it says
OFF = 0.2  # of a budget of seconds, for which training was longer or shorter


@dataclass(frozen=True)
class Cost:
    """What a method takes: seconds of a meta-step and its peak memory in bytes (None: not measurable), side by side with the
    others on this machine, and the engine's way; seconds of each training; evaluations of tasks' losses in one training."""

    seconds_per_step: float
    bytes: int | None
    way: str
    training_seconds: tuple[float, ...]
    gradients: int

    @property
    def seconds(self) -> float:
        """Of a training, the mean over the seeds."""
        return sum(self.training_seconds) / len(self.training_seconds)


@dataclass(frozen=True)
class Row:
    """One method: how it was trained and judged, its scores (R, E), what follows from them, what it costs, and its curves.

    baselines: mean and half the 95 % interval, by name. curves: of each seed, the validations (see `runs.metrics`).
    """

    name: str
    recipe: str = field(repr=False)
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    iterations: int
    tasks_per_step: int
    steps: int
    scores: Scores = field(repr=False)
    mean: float
    over_episodes: Interval | None
    over_seeds: Interval | None
    iqm: float
    iqm_over_seeds: Interval | None
    rank: float
    cost: Cost
    baselines: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    curves: tuple[Sequence[Mapping[str, Any]], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Comparison:
    """Rows from the best to the worst, all pairs of them, and the facts that give the numbers their meaning."""

    metric: str
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    facts: Mapping[str, Any]

    def against_best(self, row: Row) -> Pair | None:
        """A row's pair with the best one, told from the row's side; None for the best."""
        best = self.rows[0]
        if row is best:
            return None
        pair = next(p for p in self.pairs if {p.first, p.second} == {row.name, best.name})
        return pair if pair.first == row.name else pair.turned()

    @property
    def caveats(self) -> dict[str, str]:
        """What the numbers don't say, a sentence each, where there is something: of the "seeds", "episodes" and "cost"."""
        seeds, budget = max(len(row.seeds) for row in self.rows), self.facts["budget"]
        known = f"intervals over {plural(seeds, 'seed')} are too short" if seeds < ENOUGH else ""
        if not any(row.over_seeds for row in self.rows):
            known = "one seed: how much another training would differ isn't known"
        took = {row.name: row.cost.seconds for row in self.rows} if budget["kind"] == "seconds" else {}
        off = [f"{name} took {x:.1f} s" for name, x in took.items() if abs(x / budget["amount"] - 1) > OFF]
        missed = f"seconds were estimated, and missed by more than a fifth: {', '.join(off)}" if off else ""
        told = {"seeds": known, "episodes": few_tasks(self.facts["tasks"]), "cost": missed}
        return {about: sentence for about, sentence in told.items() if sentence}

    def table(self) -> RenderableType:
        """Scores, differences to the best, costs, and what baselines reach."""
        return Group(*(t for t in (self._scores(), self._differences(), self._costs(), self._baselines()) if t.row_count))

    def _scores(self) -> Table:
        several = any(row.over_seeds for row in self.rows)
        seeded = ["over seeds", "IQM", "over seeds"] if several else ["IQM"]
        title = f"{self._unit}: mean and interquartile mean, with 95 % intervals"
        table = _table(title, [self._episodes, *seeded, "rank"], self._caveats("seeds", "episodes"))
        for row in self.rows:
            seeds_too = [self._ends(row.over_seeds)] if several else []
            iqm_too = [self._ends(row.iqm_over_seeds)] if several else []
            mean = f"{self._number(row.mean)} {self._ends(row.over_episodes)}"
            table.add_row(row.name, mean, *seeds_too, self._number(row.iqm), *iqm_too, f"{row.rank:.2f}")
        return table

    def _differences(self) -> Table:
        pairs = [(row.name, pair) for row in self.rows if (pair := self.against_best(row))]
        several = any(pair.over_seeds for _, pair in pairs)
        test = f"p: sign-flip test over episodes, corrected by Holm for {plural(len(self.pairs), 'pair')}"
        columns = [self._episodes, *(["over seeds"] if several else []), "p"]
        table = _table(f"difference to {self.rows[0].name}", columns, f"{test}\n{self._caveats('episodes')}")
        for name, pair in pairs:
            over_seeds = [self._ends(pair.over_seeds, True)] if several else []
            told = f"{self._number(pair.difference, True)} {self._ends(pair.over_episodes, True)}"
            table.add_row(name, told, *over_seeds, f"{pair.corrected:.4f}")
        return table

    def _costs(self) -> Table:
        budget = self.facts["budget"]
        told = "each its own" if budget["kind"] is None else f"the same {budget['kind']}, {budget['amount']:g}"
        columns = ["outer steps", "tasks", "gradients", "training, s", "step, ms", "peak, MiB"]
        table = _table(f"cost; budget: {told}", columns, f"means over the seeds\n{self._caveats('cost')}")
        for row in self.rows:
            cost = row.cost
            used = "–" if cost.bytes is None else f"{cost.bytes / 2**20:.0f}" if cost.bytes >= 2**20 else "< 1"
            counts = f"{row.iterations:,}", str(row.tasks_per_step), f"{cost.gradients:,}"
            table.add_row(row.name, *counts, f"{cost.seconds:.1f}", f"{1000 * cost.seconds_per_step:.1f}", used)
        return table

    def _baselines(self) -> Table:
        table = _table("baselines", [self._unit], first="baseline")
        for name, (mean, half) in self.baselines.items():
            table.add_row(name, f"{self._number(mean)} ± {self._number(half)}" if half == half else self._number(mean))
        return table

    def _caveats(self, *about: str) -> str:
        return "\n".join(self.caveats[one] for one in about if one in self.caveats)

    @property
    def _unit(self) -> str:
        return "accuracy, %" if self.metric == "accuracy" else "loss"

    @property
    def _episodes(self) -> str:
        return f"over {plural(self.facts['episodes'], 'episode')}"

    @property
    def baselines(self) -> dict[str, tuple[float, float]]:
        """Mean and half the interval of each row's baselines; one that is the same for all stands there once."""
        found: dict[str, tuple[float, float]] = {}
        for name in dict.fromkeys(n for row in self.rows for n in row.baselines):
            known = {row.name: row.baselines[name] for row in self.rows if name in row.baselines}
            alike = len(set(known.values())) == 1 and len(known) > 1
            found |= {name: next(iter(known.values()))} if alike else {f"{name}, {who}": x for who, x in known.items()}
        return found

    def _number(self, value: float, signed: bool = False) -> str:
        scale, digits = (100, 2) if self.metric == "accuracy" else (1, 3 if abs(self.rows[0].mean) >= 0.1 else 4)
        return f"{scale * value:{'+' if signed else ''}.{digits}f}"

    def _ends(self, interval: Interval | None, signed: bool = False) -> str:
        return "" if interval is None else f"[{', '.join(self._number(x, signed) for x in interval)}]"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(self.table())
        return cast(io.StringIO, console.file).getvalue().rstrip()

    def __repr__(self) -> str:
        best = self.rows[0]
        return f"Comparison({best.name} is the best of {len(self.rows)}: {self.metric} {self._number(best.mean)})"

    def json(self) -> dict[str, Any]:
        """All of it in JSON's types; scores of single episodes are in the file that `scores` names, under the method's name."""
        methods = []
        for row in self.rows:
            fields = {name: value for name, value in vars(row).items() if name not in ("scores", "cost")}
            methods.append(
                fields
                | {"by_seed": row.scores.mean(1).tolist(), "scores": f"{SCORES}: {row.name}", "cost": vars(row.cost)}
                | {"over_episodes": _ends(row.over_episodes), "over_seeds": _ends(row.over_seeds)}
                | {"iqm_over_seeds": _ends(row.iqm_over_seeds)}
            )
        pairs = [p._asdict() | {"over_episodes": _ends(p.over_episodes), "over_seeds": _ends(p.over_seeds)} for p in self.pairs]
        told = {"format": FORMAT, "metric": self.metric, "more_is_better": self.metric == "accuracy"}
        return told | dict(self.facts) | {"caveats": self.caveats, "methods": methods, "pairs": pairs}

    def save(self, folder: str | Path) -> Path:
        """Writes comparison.json and scores.safetensors into a folder; returns the path of the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = folder / FILE
        tensors = {row.name: torch.tensor(row.scores) for row in self.rows}
        write_atomic(folder / SCORES, safetensors.torch.save(tensors), stale=numbers)
        write_atomic(numbers, f"{strict_json(self.json(), indent=2)}\n".encode())
        return numbers

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: differences to the best, and validation scores against outer steps and seconds."""
        from metaoptim.report.comparison import draw  # here, because matplotlib is slow to load

        draw(self.json(), Path(path))


def ranked(metric: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> Comparison:
    """Rows in their order, with all pairs."""
    ordered = sorted(rows, key=lambda row: -row.mean if metric == "accuracy" else row.mean)
    found = statistics.pairs({row.name: row.scores for row in ordered}, {row.name: row.seeds for row in ordered})
    return Comparison(metric, tuple(ordered), tuple(found), facts)


def _table(title: str, columns: Sequence[str], caption: str = "", first: str = "method") -> Table:
    """An empty table, whose first column are names and the others numbers."""
    table = Table(title=title, caption=caption.strip() or None, min_width=NARROW)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
