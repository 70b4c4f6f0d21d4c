"""What a warm start saves: trials of `tune` until its best is within one standard error of the best that is found at all.

    python benchmarks/warm_start.py [--recipe fertility-maml] [--trials 20] [--seeds 3] [--iterations 1500] [--out DIR]

The recipe is searched from its algorithm's default step sizes and number of steps, twice for each seed of the search: cold, and
with the points first that `recommend` takes from trials on other data. The trials on the recipe's own data are left out of
what it learns from. Finished trials are kept in --out, and the same command goes on.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import CONSOLE

from metaoptim.design.history import data_key, shipped_trials
from metaoptim.design.recommend import recommend
from metaoptim.recipes import recipe as config
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.environment import environment
from metaoptim.runs.store import write_atomic

SPACE = {"algorithm.steps": "1..10", "algorithm.lr": "log:0.001..1", "train.lr": "log:0.0001..0.1"}


def needed(scores: Sequence[float | None], target: float, higher: bool) -> int | None:
    """The number of the first trial, from 1, that is as good as the target; None: none is."""
    reached = (n for n, x in enumerate(scores, 1) if x is not None and (x >= target if higher else x <= target))
    return next(reached, None)


def target(runs: Sequence[Sequence[tuple[float, float] | None]], higher: bool) -> float:
    """One standard error short of the best score of all runs, whose trials are (score, standard error) each, or None."""
    score, error = (max if higher else min)((x for run in runs for x in run if x is not None), key=lambda x: x[0])
    return score - error if higher else score + error


def cold_recipe(name: str) -> config.Recipe:
    """The recipe with the default values of its algorithm's builder, and torch's 0.001 as the outer step size."""
    recipe = config.load(name)
    build = recipe.kind.builders["algorithm"][recipe.tables["algorithm"]["name"]]
    defaults = {key: p.default for key, p in inspect.signature(build).parameters.items() if key in ("lr", "steps")}
    return config.load(name, [f"algorithm.{key}={value}" for key, value in defaults.items()] + ["train.lr=0.001"])


def points(recipe: config.Recipe, features: Path) -> list[dict[str, Any]]:
    """The settings of the recipe's algorithm on other data, the best proposals first, as far as the space has them."""
    own = data_key(recipe.tables["tasks"])
    others = [trial for trial in shipped_trials() if data_key(trial.tables["tasks"]) != own]
    found = recommend(recipe, others, shipped=False, features=features, top=100)
    same = [p for p in found.proposals if p.algorithm == recipe.experiment().method.name]
    settings = [p.settings for first in same for p in (first, *first.others)]
    return [{key: point[key] for key in SPACE if key in point} for point in settings]


def searched(recipe: config.Recipe, start: Sequence[dict[str, Any]], given: argparse.Namespace, folder: Path, seed: int) -> Any:
    """A search, or what is left of it."""
    from metaoptim.design import tune

    return tune(
        recipe, SPACE, trials=given.trials, folds=given.folds, iterations=given.iterations, warm_start=start, seed=seed,
        out=folder, resume=folder.exists(),
    )  # fmt: skip


def best(row: Any, higher: bool) -> tuple[float, float] | None:
    """The score of a trial at its best number of test steps, and its standard error; None for one that did not complete."""
    pairs = list(zip(row.mean, row.error, strict=True)) if row.state == "complete" else []
    return (max if higher else min)(pairs, key=lambda pair: pair[0], default=None)


def main(args: list[str] | None = None) -> None:
    """Searches, and prints how many trials each start needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fertility-maml")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/warm"))
    given = parser.parse_args(args)
    recipe = cold_recipe(given.recipe)
    start = points(recipe, given.out)
    CONSOLE.print(f"{recipe.name}; warm starts: {start}")
    found: dict[str, list[list[tuple[float, float] | None]]] = {"cold": [], "warm": []}
    higher = False
    for seed in range(given.seeds):
        for name, first in (("cold", []), ("warm", start)):
            tuning = searched(recipe, first, given, given.out / f"{name}-s{seed}", seed)
            higher = tuning.metric == "accuracy"
            found[name].append([best(row, higher) for row in tuning.rows])
    goal = target([run for runs in found.values() for run in runs], higher)
    counts = {
        name: [needed([None if x is None else x[0] for x in run], goal, higher) for run in runs] for name, runs in found.items()
    }
    for name, numbers in counts.items():
        told = ", ".join("none in time" if n is None else str(n) for n in numbers)
        CONSOLE.print(f"{name}: trials until within one standard error of the best of all ({goal:.4g}): {told}")
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    document = {
        "options": options,
        "start": start,
        "goal": goal,
        "needed": counts,
        "scores": found,
        "environment": environment(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out / "warm.json", f"{strict_json(json.loads(json.dumps(document)), indent=1)}\n".encode())


if __name__ == "__main__":
    main()
