"""The record of a search: trials, what was picked of them and why, and how much each key matters."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.table import Table

from metaoptim.core.brief import plural
from metaoptim.design.space import TEST_STEPS
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import RECIPE, write_atomic

Rule = Literal["one-se", "best"]
State = Literal["complete", "pruned", "diverged", "refused"]
JSON, PICTURE = "study.json", "study.png"
WIDTH = 120


@dataclass(frozen=True)
class Row:
    """A trial: what was drawn, and what came of it.

    Args:
        number: of the trial, from 0.
        params: what the recipe was given, by key.
        state: "complete"; "pruned", where it was stopped because others did better; "diverged", where a loss was not finite,
            which counts as the worst; or "refused", where the recipe can't be built or trained so.
        train_steps: inner steps K in training.
        steps: the numbers of inner steps at test, (C).
        mean: the mean score over all episodes of all folds after each of them, (C); empty unless complete.
        error: its standard error, s / √n over these n episodes, (C).
        folds: the mean of each fold, (folds, C).
        seconds: what it took.
        reason: why it did not complete.
    """

    number: int
    params: Mapping[str, Any]
    state: State
    train_steps: int = 0
    steps: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    folds: tuple[tuple[float, ...], ...] = ()
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Pick:
    """A trial and a number of inner steps at test, the best of all beside it, and the rule in words."""

    trial: int
    test_steps: int
    score: float
    error: float
    best: tuple[int, int, float, float]
    rule: Rule
    why: str


class Candidate:
    """A trial judged after one of its numbers of inner steps at test."""

    def __init__(self, row: Row, place: int) -> None:
        self.row, self.test_steps = row, row.steps[place]
        self.score, self.error = row.mean[place], row.error[place]

    @property
    def cost(self) -> tuple[int, int]:
        """Inner steps in training, and then at test."""
        return self.row.train_steps, self.test_steps


def pick(rows: Sequence[Row], metric: str, rule: Rule, allowed: Sequence[int]) -> Pick:
    """The trial and the number of inner steps at test that a rule takes.

    "best": the best mean score. "one-se": of all within one standard error of the best mean score (that of the best, s / √n
    over the episodes of all folds), those with the fewest inner steps in training, of these those with the fewest at test, and
    of these the best one (Breiman et al. 1984, Classification and Regression Trees, section 3.4.3).

    allowed: numbers of inner steps at test that may be taken. ValueError where no trial is complete.
    """
    sign = 1 if metric == "accuracy" else -1
    found = [Candidate(r, i) for r in rows if r.state == "complete" for i, k in enumerate(r.steps) if k in allowed]
    if not found:
        reasons = [f"; trial {r.number}: {r.reason}" for r in rows if r.reason]
        raise ValueError(f"no trial was completed, so that none can be picked{reasons[0] if reasons else ''}")
    best = max(found, key=lambda c: (sign * c.score, [-n for n in c.cost]))
    near = [c for c in found if sign * (best.score - c.score) <= best.error] if rule == "one-se" else [best]
    taken = min(near or [best], key=lambda c: (c.cost, -sign * c.score))
    at = (best.row.number, best.test_steps, best.score, best.error)
    return Pick(taken.row.number, taken.test_steps, taken.score, taken.error, at, rule, _why(taken, best, metric, rule))


def _why(taken: Candidate, best: Candidate, metric: str, rule: Rule) -> str:
    """Which trial, by which rule, in a sentence or two."""

    def told(c: Candidate) -> str:
        train, test = c.cost
        steps = f"{plural(train, 'inner step')} in training and {test} at test" if train else "no inner steps in training"
        return f"trial {c.row.number} ({steps}, {metric} {c.score:.4g} ± {c.error:.2g})"

    if rule == "best":
        return f"By the best score: {told(best)}."
    by = "By the rule of one standard error"
    if taken is best:
        return f"{by}: {told(best)} is the best, and nothing within its standard error takes fewer steps."
    return f"{by}: the best is {told(best)}; of those within its standard error, {told(taken)} takes the fewest inner steps."


@dataclass(frozen=True)
class Tuning:
    """What `tune` returns.

    Args:
        base: the recipe that was searched from.
        metric: "accuracy", of which more is better, or "loss", of which less is.
        space: what was searched, by key, in words.
        rows: the trials in their order.
        picked: which is recommended, and why.
        importances: the share of each key in what makes a trial one of the best tenth; {}: too few trials to say.
        facts: how it was measured, and where: folds, episodes, iterations, environment, command.
    """

    base: Recipe
    metric: str
    space: Mapping[str, str]
    rows: tuple[Row, ...]
    picked: Pick
    importances: Mapping[str, float]
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def recipe(self) -> Recipe:
        """The chosen recipe, to be trained on the whole training split for as many iterations as it says itself."""
        row = next(row for row in self.rows if row.number == self.picked.trial)
        tested = {TEST_STEPS: self.picked.test_steps} if len(row.steps) > 1 else {}
        # A score of other values is not what is to be expected of these.
        chosen = self.base.replaced({**row.params, **tested, "expected": {}})
        note = f"tuned by {self.facts['folds']}-fold cross-validation over {self.facts['iterations']} outer steps"
        about = f"{self.base.description}; {note}" if self.base.description else note
        return Recipe(f"{self.base.name}-tuned", about, chosen.tables)

    def text(self, folder: Path) -> str:
        """The chosen recipe as TOML for a file in that folder, with where it comes from in its first lines."""
        values = ", ".join(f"{key} = {value}" for key, value in self._row.params.items())
        head = f"# Chosen by metaoptim tune: {values}.\n# {self.picked.why}\n# {self.facts['protocol']}.\n"
        return head + self.recipe.lying_in(folder).text(absent=False)

    @property
    def _row(self) -> Row:
        return next(row for row in self.rows if row.number == self.picked.trial)

    def table(self) -> Table:
        """A row for each trial: what was drawn, its best score at test, and after how many inner steps that is; and one for
        what is picked, where that is after others."""
        counted = {s: sum(row.state == s for row in self.rows) for s in ("complete", "pruned", "diverged", "refused")}
        told = ", ".join(f"{n} {state}" for state, n in counted.items() if n)
        percent = self.metric == "accuracy"
        title = f"{self.base.name}: {plural(len(self.rows), 'trial')} ({told})"
        told = f"{self.facts['protocol']}; ± one standard error; * is picked"
        if len(self.facts["test_steps"]) > 1:
            told += "; each score is the trial's best, after so many test steps, and that of *, after those of the rule"
        table = Table(title=title, caption=told)
        for name in ("trial", *self.space):
            if name != TEST_STEPS:
                table.add_column(name, justify="right")
        for name in ("after test steps", "accuracy, %" if percent else "loss", "seconds", "state"):
            table.add_column(name, justify="right", no_wrap=True)
        scale, digits = (100, 2) if percent else (1, 4)
        for row in self.rows:
            drawn = [_shown(row.params[key]) for key in self.space if key != TEST_STEPS]
            for at in self.places(row):
                own = row.number == self.picked.trial and row.steps[at] == self.picked.test_steps
                cells = [str(row.steps[at]), f"{scale * row.mean[at]:.{digits}f} ± {scale * row.error[at]:.{digits}f}"]
                mark, style = ("*", "bold") if own else ("", None)
                table.add_row(f"{mark}{row.number}", *drawn, *cells, f"{row.seconds:.0f}", row.state, style=style)
            if row.state != "complete":
                table.add_row(str(row.number), *drawn, "", "", f"{row.seconds:.0f}", row.state)
        return table

    def places(self, row: Row) -> list[int]:
        """Which of a trial's numbers of test steps are shown: the best one and, of the picked trial, the picked one."""
        known = [i for i, k in enumerate(row.steps) if k in self.facts["test_steps"]] if row.state == "complete" else []
        best = sorted(known, key=lambda i: -row.mean[i] if self.metric == "accuracy" else row.mean[i])[:1]
        taken = [i for i in known if row.number == self.picked.trial and row.steps[i] == self.picked.test_steps]
        return list(dict.fromkeys([*best, *taken]))

    @property
    def said(self) -> str:
        """What was picked and what mattered, in sentences."""
        if not self.importances and len([key for key in self.space if key != TEST_STEPS]) < 2:
            return self.picked.why
        if not self.importances:
            return f"{self.picked.why} Too few trials were completed to say which keys matter."
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in self.importances.items())
        return f"{self.picked.why} What makes a trial one of the best: {shares} (PED-ANOVA)."

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(self.table())
        return f"{cast(io.StringIO, console.file).getvalue().rstrip()}\n{self.said}"

    def json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return {
            "metric": self.metric, "space": dict(self.space), "picked": asdict(self.picked), "said": self.said,
            "importances": dict(self.importances), "trials": [asdict(row) for row in self.rows], **self.facts,
            "recipe": self.base.text(), "chosen": self.recipe.text(),
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Writes study.json, study.png and recipe.toml, the chosen one; returns the path of that."""
        from metaoptim.design.study_picture import draw  # here, because matplotlib is slow to load

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / JSON, f"{strict_json(self.json(), indent=2)}\n".encode())
        write_atomic(folder / RECIPE, self.text(folder).encode())
        draw(self, folder / PICTURE)
        return folder / RECIPE


def finite(values: Sequence[float]) -> bool:
    """Whether all scores are numbers."""
    return all(map(math.isfinite, values))


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:.3g}"
