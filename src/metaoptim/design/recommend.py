"""Which strategy to try on new tasks: predicted from what was tried on others, as far as that can be predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from metaoptim.design import moved as moving
from metaoptim.design import trials as stored
from metaoptim.design.history import (
    CUT,
    History,
    Row,
    history,
    judged_on,
    judged_tasks,
    known_features,
    shipped_trials,
    tasks_key,
)
from metaoptim.design.predictors import MODELS, Floats
from metaoptim.design.recommendation import Proposal, Recommendation
from metaoptim.design.selection import Judgement, by_family, judge, standing
from metaoptim.design.strategies import strategy
from metaoptim.design.trials import Trial
from metaoptim.recipes import recipe as config
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs.checkpoint import strict_json

SHOWN = 5


def recommend(
    tasks: str | Path | Recipe,
    trials: Sequence[Trial | str | Path] | str | Path = (),
    *,
    shipped: bool = True,
    settings: Sequence[str] = (),
    features: Path | None = None,
    top: int = SHOWN,
    say: Callable[[str], None] = lambda text: None,
) -> Recommendation:
    """Proposes a recipe for tasks, and says what the proposal is worth.

    Where strategies were tried on these very tasks, what did best there comes first; else, where the meta-model beats what
    needs none on data sets that were left out, what it predicts to be best; else the single best algorithm of all families.

    Args:
        tasks: a recipe, by name, file or itself, of which [tasks], [model], [evaluate] and [engine] are taken; or the name of a
            task family, which gets a usual model.
        trials: what was tried: folders with a trials.jsonl, such files, or trials (`design.trials.read`).
        shipped: whether to learn from the trials that come with the library too.
        settings: options that replace those of `tasks`, as in `tasks.ways=10`.
        features: a folder in which the features of families are kept that don't come with the library.
        top: how many algorithms are proposed.
        say: is told what is done.

    Errors: ValueError, for recipes of learned optimizers, tasks that can't be read, or where nothing was tried on their like.
    """
    target = config.given(tasks, settings) if isinstance(tasks, Recipe) else moving.wanted(tasks, settings)
    target.experiment("recommend")
    known = known_features() | (known_features(features) if features else {})
    key = tasks_key(target.tables["tasks"])
    if key not in known:
        say("looking at the tasks")
        known[key] = judged_tasks(target)
    like = known[key]
    say("reading trials")
    past = history([*(shipped_trials() if shipped else ()), *_read(trials)], known)
    judgement = judge(past, say=say)
    rows = [row for row in past.rows if row.tasks["classification"] == like["classification"]]
    here, apart = _tried([row for row in rows if tasks_key(row.trial.tables["tasks"]) == key])
    candidates = _candidates(rows, like, target, here)
    if not candidates:
        kind = "classification" if like["classification"] else "regression"
        raise ValueError(f"nothing was tried on {kind} that can be moved to {target.name}; pass trials of such tasks.")
    say(f"{judgement.model}, of all")
    guesses = MODELS[judgement.model](past.rows)([asked for asked, _, _ in candidates])
    proposals = _ranked(candidates, guesses, past, judgement, {id(row) for row in here})
    for proposal in proposals:
        say(f"trying {proposal.recipe.name}")
        if not moving.goes(proposal.recipe):
            break
        proposals = [p for p in proposals if p is not proposal]
    if not proposals:
        raise ValueError(f"no strategy that was tried can be trained on {target.name}; look at its model and at its tasks.")
    tried = judged_on(here[0].trial) if here else ""
    return Recommendation(target, like, proposals[:top], judgement, str(past), past.left_out, tried, apart, known)


def _tried(rows: Sequence[Row]) -> tuple[Sequence[Row], dict[str, int]]:
    """Of the rows of the very tasks those that were judged alike, as most algorithms were, and how many others were judged on
    what."""
    groups = by_family(rows).values()
    taken = max(groups, key=lambda group: (len({r.strategy["algorithm"] for r in group}), len(group)), default=[])
    others = Counter(judged_on(row.trial) for group in groups if group is not taken for row in group)
    return taken, dict(others)


def _candidates(
    rows: Sequence[Row], like: dict[str, float], target: Recipe, here: Sequence[Row]
) -> list[tuple[Row, Row, Recipe]]:
    """What can be asked for: the row to predict, the one that it comes of, and its recipe; those here, then by distance."""
    found: dict[str, tuple[Row, Row, Recipe]] = {}
    own, far = {id(row) for row in here}, _distance(rows, like)
    for source in sorted(rows, key=lambda row: (id(row) not in own, far(row))):
        try:
            recipe = moving.moved(source, rows, target)
            asked = Row(source.trial, "asked", "asked", 0.0, like, strategy(recipe))
        except (ValueError, OSError):
            continue  # an algorithm and a model, or tasks, that don't go together
        found.setdefault(strict_json(recipe.content, sort_keys=True), (asked, source, recipe))
    return list(found.values())


def _distance(rows: Sequence[Row], like: dict[str, float]) -> Callable[[Row], float]:
    """How far a row's family is from the one asked for, each feature in its standard deviations over families."""
    families = {row.family: row.tasks for row in rows}
    names = sorted(like)
    table = np.array([[tasks[name] for name in names] for tasks in [*families.values(), like]])
    scale = table.std(0)
    scale[scale == 0] = 1
    far = np.linalg.norm((table[:-1] - table[-1]) / scale, axis=1)
    distances = dict(zip(families, far.tolist(), strict=True))
    return lambda row: distances[row.family]


def _ranked(
    candidates: Sequence[tuple[Row, Row, Recipe]], guesses: Floats, past: History, judgement: Judgement, here: set[int]
) -> list[Proposal]:
    """One proposal for each algorithm, the best first, with its other settings as further starting points."""
    means = standing(past.rows)
    found: dict[str, list[Proposal]] = {}
    for place, ((asked, source, recipe), guess) in enumerate(zip(candidates, guesses, strict=True)):
        name, score = str(asked.strategy["algorithm"]), float(guess)
        measured = source.trial.value if id(source) in here else None
        order = (-source.score if id(source) in here else CUT + 1, *((-score,) if judgement.trusted else (-means[name], place)))
        low, high = (max(-CUT, score - judgement.width), min(CUT, score + judgement.width))
        tried = len({row.family for row in past.rows if row.strategy["algorithm"] == name})
        found.setdefault(name, []).append(
            Proposal(name, source.trial.recipe, recipe, score, (low, high), means[name], tried, measured, order)
        )
    groups = [sorted(group, key=lambda proposal: proposal.order) for group in found.values()]
    return [group[0].beside(group[1:]) for group in sorted(groups, key=lambda group: group[0].order)]


def _read(given: Sequence[Trial | str | Path] | str | Path) -> list[Trial]:
    """Trials as they are, or those of files and folders; ValueError where there are none."""
    found: list[Trial] = []
    for one in [given] if isinstance(given, str | Path) else given:
        here = [one] if isinstance(one, Trial) else stored.read(one)
        if not here:
            raise ValueError(f"there are no trials in {one}; expected {stored.FILE}, or a folder with one.")
        found += here
    return found
