"""Does tuning find what a recipe needs? From poor starting values, beside the recipe that ships, with the same budget.

    python benchmarks/tuning.py omniglot-maml --workers 2
    python benchmarks/tuning.py fertility-maml --workers 2

The search begins at values that were chosen to be poor (`POOR`), in a space that is given here, and ends after the time that is
given. Then the recipe that it picked and the one that ships are trained from scratch on the whole training split, for the same
number of outer steps, and judged on the same test episodes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from shared import CONSOLE, RESULTS, save, summary

import metaoptim as mo
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Evaluation
from metaoptim.recipes.recipe import Recipe

SPACE = {"algorithm.steps": "1..5", "algorithm.lr": "log:0.005..1", "train.lr": "log:0.0001..0.03"}
POOR = {"algorithm.steps": 5, "algorithm.lr": 0.005, "train.lr": 0.0001}
"""Five steps that are so short that they do little, and an outer step size with which little is learnt in so few steps."""

EPISODES = 100  # by which a trial is scored on each fold


@dataclass(frozen=True)
class Budget:
    """Seconds of the search, outer steps of its trainings, and outer steps of the two trainings that are compared."""

    seconds: float
    trial_iterations: int
    iterations: int


BUDGETS = {"omniglot-maml": Budget(900, 120, 1200), "fertility-maml": Budget(600, 600, 6000)}


def judged(recipe: Recipe, folder: Path) -> tuple[Evaluation, float]:
    """Trains a recipe and judges it on test; the seconds that training took."""
    experiment, began = recipe.experiment(), time.perf_counter()
    run = experiment.train(folder, progress=False)
    seconds = time.perf_counter() - began
    return experiment.evaluate([run], progress=False), seconds


def compared(name: str, budget: Budget, workers: int, folder: Path) -> dict[str, Any]:
    """The search, and both recipes on test."""
    poor = config.load(name).replaced({**POOR, "train.validate_episodes": EPISODES})
    began = time.perf_counter()
    found = mo.tune(
        poor, SPACE, seconds=budget.seconds, iterations=budget.trial_iterations, workers=workers, out=folder / "study",
        say=CONSOLE.print,
    )  # fmt: skip
    searched = time.perf_counter() - began
    CONSOLE.print(found.table())
    CONSOLE.print(found.said)
    plain = {"train.iterations": budget.iterations, "evaluate.baselines": []}
    recipes = {"shipped": config.load(name), "tuned": found.recipe}
    results = {which: judged(recipe.replaced(plain), folder / which) for which, recipe in recipes.items()}
    shipped, tuned = results["shipped"][0], results["tuned"][0]
    if shipped.facts["episodes_sha256"] != tuned.facts["episodes_sha256"]:
        raise ValueError("the recipes were not judged on the same episodes.")
    sign = 1 if shipped.metric == "accuracy" else -1
    behind, error = sign * (shipped.mean - tuned.mean), shipped.interval / 1.96
    rows = {
        which: {"mean": result.mean, "interval": result.interval, "steps": result.facts["steps"], "seconds": seconds}
        for which, (result, seconds) in results.items()
    }
    return {
        "recipe": name, "budget": vars(budget), "workers": workers, "space": SPACE, "poor": POOR, "metric": shipped.metric,
        "search_seconds": searched, "trials": len(found.rows), "picked": found.recipe.tables["algorithm"], "why": found.said,
        "train_lr": found.recipe.tables["train"]["lr"], "rows": rows, "behind": behind, "standard_error": error,
        "within": behind <= error,
    }  # fmt: skip


def table(record: dict[str, Any]) -> Table:
    """Both recipes."""
    budget = record["budget"]
    shown = Table(title=f"{record['recipe']}, {budget['iterations']} outer steps each, on test: {record['metric']} ± 95 %")
    for name in ("recipe", record["metric"], "test steps", "seconds to train"):
        shown.add_column(name, justify="left" if name == "recipe" else "right")
    for name, row in record["rows"].items():
        shown.add_row(name, f"{row['mean']:.4f} ± {row['interval']:.4f}", str(row["steps"]), f"{row['seconds']:.0f}")
    return shown


def main() -> None:
    """Runs it for one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=BUDGETS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of the search, in place of the budget's")
    parser.add_argument("--trial-iterations", type=int, help="outer steps of a trial's trainings")
    parser.add_argument("--iterations", type=int, help="outer steps of the trainings that are compared")
    parser.add_argument("--out", type=Path, help="a folder that is not there yet; runs/benchmarks/tuning-RECIPE if not given")
    given = parser.parse_args()
    usual = BUDGETS[given.recipe]
    budget = Budget(
        given.seconds or usual.seconds, given.trial_iterations or usual.trial_iterations, given.iterations or usual.iterations
    )
    folder = given.out or RESULTS / f"tuning-{given.recipe}"
    CONSOLE.print(summary())
    record = compared(given.recipe, budget, given.workers, folder)
    CONSOLE.print(table(record))
    where = "within" if record["within"] else "not within"
    CONSOLE.print(
        f"After {record['search_seconds']:.0f} s and {record['trials']} trials: the tuned recipe is {where} one standard error "
        f"of the shipped one (behind by {record['behind']:.4f}, standard error {record['standard_error']:.4f})."
    )
    save(folder / "tuning.json", record)


if __name__ == "__main__":
    main()
