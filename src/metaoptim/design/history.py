"""Trials as a meta-model reads them: what each family is like, what each strategy is, and scores that families have in common.

A score is made of e, what is left to do: 1 − accuracy, or the loss. Families differ in how hard they are and in how much
depends on the strategy, so −log e is centred at the family's median and divided by its typical deviation (the median of
|−log e − median|, times 1.4826, so that it is a standard deviation where scores are normal: Hampel 1974), and cut at ±3; a run
that diverged gets −3. So 0 is the middle of what was tried on these tasks, and 1 one deviation better. Logarithms,
because halving an error counts the same on easy and on hard tasks; medians, because some strategies fail altogether, and would
make all others look the same; and not ranks, for which a hair's breadth counts as much as a factor of ten.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from metaoptim.design import trials as stored
from metaoptim.design.features import Features, features
from metaoptim.design.strategies import Strategy, rebuilt, strategy
from metaoptim.design.trials import Trial
from metaoptim.recipes.learned_optimizers import LearnedOptimizers
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

RECORDS = "records"
FAMILIES = "families.json"
CUT, NORMAL, FEWEST = 3.0, 1.4826, 4
FEW = f"families with fewer than {FEWEST} strategies"
SHAPES = ("ways", "shots", "queries", "train_shots")  # which say how episodes are cut out of data, not which data


class Row(NamedTuple):
    """A strategy on a family: `trial` (the mean over seeds), its score, what both are like, and the data they are of."""

    trial: Trial
    family: str
    data: str
    score: float
    tasks: Features
    strategy: Strategy


@dataclass(frozen=True)
class History:
    """What there is to learn from.

    rows: strategies on families. left_out: what could not be used, each with a number and a reason.
    """

    rows: Sequence[Row]
    left_out: Mapping[str, int]

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(row.family for row in self.rows))

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(row.data for row in self.rows))

    def __str__(self) -> str:
        return f"{len(self.rows)} trials of {len(self.families)} families of tasks, from {len(self.data)} data sets"

    __repr__ = __str__


def shipped_trials() -> list[Trial]:
    """The trials that come with the library."""
    with resources.as_file(resources.files("metaoptim") / "design" / RECORDS) as folder:
        return stored.read(folder)


def known_features(folder: Path | None = None) -> dict[str, Features]:
    """The features of families that were looked at before, by `tasks_key`; without a folder, those of the library."""
    if folder is None:
        with resources.as_file(resources.files("metaoptim") / "design" / RECORDS) as own:
            return known_features(own)
    file = folder / FAMILIES
    if not file.is_file():
        return {}
    try:
        return {key: {name: float(x) for name, x in row.items()} for key, row in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no features of families ({error}); remove it, and they are measured again.") from error


def save_features(folder: Path, known: Mapping[str, Features]) -> None:
    """Writes what `known_features` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FAMILIES, f"{strict_json(dict(known), indent=1, sort_keys=True)}\n".encode())


def tasks_key(tasks: Mapping[str, Any]) -> str:
    """What makes families the same: the table [tasks], but for the shots in training, which are a strategy's affair."""
    return strict_json({k: x for k, x in tasks.items() if k not in ("train_shots", "root")}, sort_keys=True)


def data_key(tasks: Mapping[str, Any]) -> str:
    """The data that tasks are of: families that differ only in how episodes are shaped are never held out apart."""
    named = tasks.get("table") or tasks.get("root")
    return str(tasks["name"]) if named is None else f"{tasks['name']} {named}"


def judged_tasks(recipe: Recipe) -> Features:
    """The features of the family that a recipe is judged on. Errors: those of building tasks, and of `features`."""
    tables = {name: dict(table) for name, table in recipe.tables.items()}
    if tables["tasks"].get("train_shots") is not None:
        tables["tasks"]["train_shots"] = None
    found = features(Recipe(recipe.name, "", tables).experiment().tasks)
    return {name: float(f"{x:.6g}") for name, x in found.items()}


def left(metric: str, value: float | None, episodes: int) -> float:
    """What is left to do, e: 1 − accuracy, at least that of half a mistaken episode, or the loss; infinite if it diverged."""
    if value is None or not math.isfinite(value):
        return math.inf
    return max(1 - value, 0.5 / max(episodes, 1)) if metric == "accuracy" else max(value, 1e-12)


def standardised(remaining: Sequence[float]) -> list[float] | None:
    """Scores of the strategies of one family, as above, from what each leaves to do; None where all leave the same."""
    return centred([-math.log(e) if math.isfinite(e) else -math.inf for e in remaining])


def centred(values: Sequence[float]) -> list[float] | None:
    """Numbers less their median, in typical deviations (the mean one, where most are equal), cut at ±3; None if all are."""
    finite = [x for x in values if math.isfinite(x)]
    middle = median(finite) if finite else 0.0
    deviations = [abs(x - middle) for x in finite]
    spread = NORMAL * median(deviations) or fmean(deviations) if finite else 0.0
    return [max(-CUT, min(CUT, (x - middle) / spread)) for x in values] if spread else None


def history(trials: Iterable[Trial], known: dict[str, Features]) -> History:
    """Sorts trials into families and standardises them; features that are not `known` are measured, and added there."""
    left_out: dict[str, int] = defaultdict(int)
    groups: dict[tuple[str, str, str, str], dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.tables["algorithm"]["name"] in LearnedOptimizers.builders["algorithm"]:
            left_out["learned optimizers"] += 1
            continue
        # How many steps a strategy takes is its own affair; the folds of a search are the search's.
        study = trial.protocol if trial.source == "tune" else ""
        group = groups[tasks_key(trial.tables["tasks"]), trial.metric, judged_on(trial), study]
        group[strict_json(trial.tables, sort_keys=True)].append(trial)
    rows: list[Row] = []
    for (key, metric, where, study), same in groups.items():
        found, reason = _family(key, f"{metric} {where} {study}", [_mean(seeds) for seeds in same.values()], known)
        rows += found
        others = sorted({w for k, m, w, _ in groups if (k, m) == (key, metric) and w != where})
        if reason == FEW and others:
            reason = f"{FEW} judged on {where}, whose scores don't compare with those on {' and '.join(others)}"
        if lost := len(same) - len(found):
            left_out[reason or "recipes that can't be built"] += lost
    return History(rows, dict(left_out))


def judged_on(trial: Trial) -> str:
    """What the scores are of, in words; those of others don't compare with them."""
    return "held-out folds of split train" if trial.source == "tune" else f"split {trial.split}"


def _family(key: str, judged: str, tried: list[Trial], known: dict[str, Features]) -> tuple[list[Row], str]:
    """The rows of a family whose trials were all judged alike, and why there are none of it."""
    metric = tried[0].metric
    built: list[tuple[Trial, Recipe, Strategy]] = []
    for trial in tried:
        try:
            recipe = rebuilt(trial.recipe, trial.tables)
            built.append((trial, recipe, strategy(recipe)))
        except (ValueError, OSError):
            continue
    if len(built) < FEWEST:
        return [], FEW
    scores = standardised([left(metric, trial.value, trial.episodes) for trial, _, _ in built])
    if scores is None:
        return [], "families where all strategies do the same"
    if key not in known:
        try:
            known[key] = judged_tasks(built[0][1])
        except (ValueError, OSError):
            return [], "tasks whose data are not here"
    name, data = f"{key} {judged}", data_key(built[0][1].tables["tasks"])
    return [Row(trial, name, data, score, known[key], like) for (trial, _, like), score in zip(built, scores, strict=True)], ""


def _mean(seeds: list[Trial]) -> Trial:
    """One trial for those that differ only in their seed: the mean of what is finite, a repeated seed counting once."""
    last = {trial.seed: trial for trial in seeds}.values()
    values = [trial.value for trial in last if trial.value is not None and trial.finite]
    first = next(iter(last))
    return Trial(**{**vars(first), "value": fmean(values) if values else None})
