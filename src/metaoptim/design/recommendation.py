"""What `recommend` finds: proposals, what they are worth, and files to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metaoptim.design.features import Features
from metaoptim.design.history import known_features, save_features
from metaoptim.design.selection import CHOSEN, LEVEL, RANDOM, SINGLE, Held, Judgement
from metaoptim.design.space import SIZES, value_of
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.environment import environment
from metaoptim.runs.store import write_atomic

DOCUMENT, RECIPE, START = "recommendation.json", "recipe.toml", "start.toml"
SETTINGS = ("algorithm.steps", "algorithm.first_order", *SIZES)
POINTS, MOST_STEPS = 5, 10


@dataclass(frozen=True)
class Proposal:
    """A strategy for the tasks.

    source: the recipe whose settings it has. recipe: the same on these tasks. score: what is predicted, and interval: where
    3 of 4 lie. mean: of the scores of its algorithm over all families, of which it was tried on `tried`. measured: accuracy or
    loss, where it was tried on these very tasks. order: proposals are sorted by it. others: its algorithm with other settings.
    """

    algorithm: str
    source: str
    recipe: Recipe = field(repr=False)
    score: float
    interval: tuple[float, float]
    mean: float
    tried: int
    measured: float | None
    order: tuple[float, ...] = field(repr=False)
    others: Sequence[Proposal] = field(default=(), repr=False)

    def beside(self, others: Sequence[Proposal]) -> Proposal:
        """The same, with others of its algorithm."""
        return replace(self, others=tuple(others))

    @property
    def settings(self) -> dict[str, Any]:
        """What a search starts from, as `table.key`."""
        found = {key: value_of(self.recipe, key) for key in SETTINGS}
        return {key: value for key, value in found.items() if value is not None}

    def starts(self, rest: Sequence[Proposal] = ()) -> list[dict[str, Any]]:
        """Different points within the space that `tune` searches by default around this one, itself first, five at the most.

        Inner steps from 1 to 10, and step sizes from a tenth to ten times of its own.
        """
        own = {key: value for key, value in self.settings.items() if _near(key, value, value)}
        points = [{key: p.settings.get(key, value) for key, value in own.items()} for p in (self, *self.others, *rest)]
        near = [point for point in points if all(_near(key, point[key], value) for key, value in own.items())]
        return [point for i, point in enumerate(near) if point and point not in near[:i]][:POINTS]

    def document(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm, "source": self.source, "predicted": self.score, "interval": list(self.interval),
            "mean_over_families": self.mean, "families_tried": self.tried, "measured_here": self.measured,
            "settings": self.settings,
        }  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """Proposals for tasks, the best first, and how the meta-model was judged.

    target: the recipe whose tasks were asked for. features: what these are like. past: what there was to learn from, and
    left_out: what could not be used. tried: what strategies were judged on that were tried on these very tasks ("": none were),
    and apart: how many more were judged on what, by that. known: features of families, by `tasks_key`.
    """

    target: Recipe = field(repr=False)
    features: Features
    proposals: Sequence[Proposal]
    judgement: Judgement
    past: str
    left_out: Mapping[str, int]
    tried: str
    apart: Mapping[str, int]
    known: Mapping[str, Features] = field(repr=False)

    def __repr__(self) -> str:
        return " ".join(self.sentences)

    @property
    def recipe(self) -> Recipe:
        """What is proposed first, ready to train."""
        return self.proposals[0].recipe

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Points from which to tune it: its settings, those of its algorithm elsewhere, and what the next ones share."""
        return self.proposals[0].starts(self.proposals[1:])

    @property
    def sentences(self) -> list[str]:
        """What the proposal rests on, in words."""
        first, held = self.proposals[0], self.judgement.held
        told = [f"Learned from {self.past}."]
        told += [f"{n} more {'was' if n == 1 else 'were'} left out: of {why}." for why, n in self.left_out.items()]
        if self.judgement.trusted:
            told.append(f"On data sets that were left out, the meta-model's pick beats one algorithm for all; {_gaps(held)}.")
        else:
            told.append(
                f"Not enough trials: {self.judgement.doubt}; {_gaps(held)}. Its predictions are shown, and not followed."
            )
        if self.tried:
            best = f"what did best on {self.tried} is {first.algorithm}, and is proposed"
            told.append(f"Strategies were tried on these very tasks; {best}.")
            told += [
                f"{n} more {'was' if n == 1 else 'were'} judged otherwise, on {where}: such scores don't compare with "
                "these, and have decided nothing."
                for where, n in self.apart.items()
            ]
        elif self.judgement.trusted:
            told.append(f"Proposed: {first.algorithm}, with the highest prediction.")
        else:
            told.append(f"The single best of what was tried elsewhere is {first.algorithm}, and is proposed.")
        theirs, own = self.recipe.tables["model"], self.target.tables["model"]
        if changed := [key for key, x in theirs.items() if own.get(key) != x]:
            values = " and ".join(f"{key} = {strict_json(theirs[key])} for {strict_json(own.get(key))}" for key in changed)
            told.append(f"It was tried with another model than yours, and keeps that: {values}.")
        return told

    def table(self) -> RenderableType:
        """The proposals, and how predictors do on data sets that they were not told of."""
        shown = Table(title=f"What to try on {self.target.name}")
        for name, side in (
            ("algorithm", "left"), ("settings of", "left"), ("K", "right"), ("inner lr", "right"), ("outer lr", "right"),
            ("predicted", "right"), (f"{LEVEL:.0%} of cases", "right"), ("mean (families)", "right"),
        ):  # fmt: skip
            shown.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
        if self.tried:
            shown.add_column("here", justify="right")
        for place, p in enumerate(self.proposals):
            point = p.settings
            cells = [
                p.algorithm,
                p.source,
                *(_number(point.get(key)) for key in ("algorithm.steps", "algorithm.lr", "train.lr")),
            ]
            cells += [f"{p.score:+.2f}", f"{p.interval[0]:+.1f} … {p.interval[1]:+.1f}", f"{p.mean:+.2f} ({p.tried})"]
            cells += [_number(p.measured)] if self.tried else []
            shown.add_row(*cells, style="bold" if place == 0 else None)
        unit = "Scores: 0 is the median of what was tried on a family, 1 is one typical deviation better."
        unit += f" Here: measured on {self.tried}." if self.tried else ""
        return Group(shown, Text(unit), Text(""), self.judged(), *(Text(line) for line in self.sentences))

    def judged(self) -> Table:
        """How predictors do on data sets that they were not told of."""
        shown = Table(title="Data sets left out in turn")
        for name in ("predictor", "gap to the best (single best: 1)", "mean error of a score"):
            shown.add_column(name, justify="left" if name == "predictor" else "right")
        for name, held in self.judgement.held.items():
            shown.add_row(name, _number(held.gap, ".2f"), _number(held.error, ".2f"))
        return shown

    def document(self) -> dict[str, Any]:
        """All of it, in JSON types."""
        return {
            "tasks": self.target.name, "features": self.features, "proposals": [p.document() for p in self.proposals],
            "judgement": self.judgement.document(), "learned_from": self.past, "left_out": dict(self.left_out),
            "tried_here": self.tried, "judged_otherwise": dict(self.apart), "sentences": self.sentences,
            "recipe": self.recipe.text(absent=False), "start": self.starts, "environment": environment(),
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Writes recommendation.json, recipe.toml, start.toml and the features of families; returns the recipe's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / DOCUMENT, f"{strict_json(self.document(), indent=2)}\n".encode())
        write_atomic(folder / START, tomli_w.dumps({"recipe": self.recipe.name, "start": self.starts}).encode())
        write_atomic(folder / RECIPE, self.recipe.lying_in(folder).text(absent=False).encode())
        shipped = known_features()
        if own := {key: row for key, row in self.known.items() if key not in shipped}:
            save_features(folder, own)
        return folder / RECIPE


def _gaps(held: Mapping[str, Held]) -> str:
    """What is left between a pick and the best one, of the model and of those that need none."""
    gaps = [f"{_number(held[name].gap, '.2f')} ({name})" for name in (CHOSEN, SINGLE, RANDOM) if held[name].gap is not None]
    return f"gaps to the best strategy: {', '.join(gaps)}" if gaps else "one algorithm is the best everywhere"


def _near(key: str, value: Any, own: Any) -> bool:
    if key == "algorithm.steps":
        return bool(MOST_STEPS >= value >= 1)
    return isinstance(value, bool) or bool(own / 10 <= value <= own * 10)


def _number(value: Any, form: str = ".4g") -> str:
    return format(value, form) if isinstance(value, int | float) else "–"
