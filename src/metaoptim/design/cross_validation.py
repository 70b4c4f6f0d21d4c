"""One trial: a recipe trained on all folds but one, and scored on that one, for each fold in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaoptim.design.folds import folded
from metaoptim.design.space import Choice, Dimension, Space, Span
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Experiment, Scores
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs import metrics
from metaoptim.runs.store import RECIPE
from metaoptim.training import TrainingError

HELD_OUT = "held-out folds of split train"

Report = Callable[[int, float], None]
"""report(step, score): told of every validation, with the outer steps of all folds so far; what it raises ends the trial."""


class TimeUpError(Exception):
    """A worker's time is over; the trial goes on later, where it stands."""


class DivergedError(Exception):
    """A loss or a score was not finite; says where."""


@dataclass(frozen=True)
class Setup:
    """What decides the scores of a study, the same for every worker.

    Args:
        recipe: that is searched from, as TOML.
        name: its name.
        space: what is searched.
        folds: k.
        iterations: outer steps of each training.
        seed: of what is drawn.
        test_steps: the numbers of inner steps at test that may be picked.
        metric: "accuracy", of which more is better, or "loss", of which less is.
        files: a hash of what the files hold that the recipe names.
    """

    recipe: str
    name: str
    space: Space
    folds: int
    iterations: int
    seed: int
    test_steps: tuple[int, ...] = ()
    metric: str = "loss"
    files: str = ""

    @property
    def json(self) -> dict[str, Any]:
        """In JSON's types, by field."""
        return {**vars(self), "space": {key: vars(d) for key, d in self.space.items()}}

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Setup:
        """From JSON."""
        space: Space = {key: _dimension(d) for key, d in known["space"].items()}
        return cls(**{**known, "space": space, "test_steps": tuple(known["test_steps"])})


def _dimension(known: Mapping[str, Any]) -> Dimension:
    return Span(**known) if "low" in known else Choice(tuple(known["values"]))


@dataclass(frozen=True)
class CrossValidation:
    """Trains and scores recipes; the tasks are built once."""

    setup: Setup

    @cached_property
    def base(self) -> Recipe:
        """The recipe, as trials are trained: for `iterations`, with three validations at the least for those who prune, and
        without a look at the gradient, which would be one look for each fold of each trial."""
        recipe, total = config.parse(self.setup.recipe, self.setup.name), self.setup.iterations
        every = recipe.tables["train"]["validate_every"]
        often = every if 0 < every <= total // 3 else max(1, -(-total // 4))
        return recipe.replaced({"train.iterations": total, "train.validate_every": often, "train.check": False})

    @cached_property
    def families(self) -> list[Any]:
        """The tasks of each fold."""
        tasks = self.base.experiment().tasks
        return [folded(tasks, fold, self.setup.folds) for fold in range(self.setup.folds)]

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """That of a trial. Errors: ConfigError."""
        return self.base.replaced(params)

    def experiment(self, recipe: Recipe, fold: int) -> Experiment:
        """The recipe on the other folds, to be judged on this one."""
        return recipe.experiment().with_tasks(self.families[fold])

    def scores(self, recipe: Recipe, folder: Path, report: Report, deadline: float | None) -> list[Scores]:
        """Those of each fold. A training that was interrupted in that folder goes on.

        Errors: DivergedError; TimeUpError after the deadline, a time as `time.time` gives it; ValueError for what can't be
        trained; and whatever `report` raises.
        """
        found: list[Scores] = []
        for fold in range(self.setup.folds):
            experiment, path = self.experiment(recipe, fold), folder / f"fold{fold}"
            before = [final(scores, self.setup) for scores in found]
            told: set[int] = set()

            def on_step(
                record: Mapping[str, Any], fold: int = fold, before: list[float] = before, told: set[int] = told
            ) -> None:
                score, step = record.get(f"val_{self.setup.metric}"), record["step"]
                if score is not None and math.isfinite(score) and step not in told:
                    told.add(step)
                    report(fold * self.setup.iterations + step, sum([*before, score]) / (fold + 1))
                if deadline is not None and time.time() > deadline:
                    raise TimeUpError

            begun = (path / RECIPE).is_file()
            for record in metrics.read(path) if begun else ():
                on_step(record)
            try:
                experiment.train(path, resume=begun, progress=False, on_step=on_step)
            except TrainingError as error:
                raise DivergedError(f"fold {fold}: {error}") from error
            scores = experiment.score(experiment.load(path, "last"), max(self.setup.test_steps) or None, HELD_OUT)
            if not scores.values.isfinite().all():
                raise DivergedError(f"fold {fold}: scores that are not finite")
            found.append(scores)
        return found


def final(scores: Scores, setup: Setup) -> float:
    """The best mean score of a fold, over the numbers of test steps that may be picked."""
    means = [scores.values[:, i].double().mean().item() for i, k in enumerate(scores.steps) if k in setup.test_steps]
    return max(means) if setup.metric == "accuracy" else min(means)


def summary(found: list[Scores]) -> dict[str, Any]:
    """Means and standard errors over the episodes of all folds after each number of test steps, and the folds' own means."""
    together: Tensor = torch.cat([scores.values.double() for scores in found])
    error = together.std(0) / len(together) ** 0.5
    return {
        "steps": list(found[0].steps), "mean": together.mean(0).tolist(), "error": error.tolist(),
        "folds": [scores.values.double().mean(0).tolist() for scores in found],
        "episodes": len(together), "protocol": f"{len(found)}-fold cross-validation, {found[0].protocol}",
    }  # fmt: skip
