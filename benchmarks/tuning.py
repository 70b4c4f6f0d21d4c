"""Does tuning from bad values reach what the shipped recipe reaches?

    python benchmarks/tuning.py [--only omniglot fertility] [--share 1.0] [--workers 1] [--out tuning]

A recipe's step sizes and inner steps are set to bad values. `metaoptim tune` searches, by cross-validation over the training
classes alone; then the recipe as it was spoilt, as it was tuned and as it is shipped are trained for the same number of outer
steps, and judged on the same test episodes by `metaoptim compare`. docs/tune.md says what comes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from shared import CONSOLE, summary

from metaoptim.recipes import recipe as config


class Case(NamedTuple):
    """A recipe, what spoils it, what is searched, trials, outer steps of theirs and of the final trainings, rule, settings."""

    recipe: str
    bad: dict[str, Any]
    search: dict[str, str]
    trials: int
    trial: int
    final: int
    pick: str
    settings: dict[str, Any]


CASES = {
    "omniglot": Case(
        "omniglot-maml",
        {"algorithm.steps": 8, "algorithm.lr": 0.005, "train.lr": 0.00005},
        {"algorithm.steps": "1..8", "algorithm.lr": "log:0.005..2", "train.lr": "log:0.00005..0.02"},
        12,
        150,
        400,
        "one-se",
        {"evaluate.baselines": [], "train.validate_every": 50, "train.validate_episodes": 50},
    ),
    "fertility": Case(
        "fertility-maml",
        {"algorithm.steps": 10, "algorithm.lr": 0.001, "train.lr": 0.00005},
        {"algorithm.steps": "1..10", "algorithm.lr": "log:0.001..1", "train.lr": "log:0.00005..0.02"},
        24,
        2000,
        2000,
        "best",
        {"evaluate.baselines": [], "train.validate_every": 100},
    ),
}


def main() -> None:
    """Tunes and compares each case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--share", type=float, default=1.0, help="of the outer steps and trials; a small one tries it out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("tuning"))
    options = parser.parse_args()
    for name in options.only:
        case, folder, began = CASES[name], options.out / name, time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        spoilt = written(case, "spoilt", case.bad, folder)
        words = [word for key, spec in case.search.items() for word in ("--search", f"{key}={spec}")]
        trials, iterations = most(3, options.share * case.trials), most(2, options.share * case.trial)
        words += ["--resume"] if (folder / "study").exists() else []
        run(1, "tune", spoilt, *words, "--trials", trials, "--iterations", iterations, "--pick", case.pick,
            "--workers", options.workers, "--out", folder / "study")  # fmt: skip
        tuned = tomllib.loads((folder / "study" / "recipe.toml").read_text())
        found = {key: tuned[table][option] for key in case.search for table, option in [key.split(".")]}
        recipes = [spoilt, written(case, "tuned", found | {"evaluate.steps": tuned["evaluate"]["steps"]}, folder)]
        recipes.append(written(case, "shipped", {}, folder))
        amount = most(2, options.share * case.final)
        run(options.workers, "compare", *recipes, "--budget", "steps", "--amount", amount, "--out", folder / "compared")
        told = json.loads((folder / "compared" / "comparison.json").read_text())
        CONSOLE.print(f"{name}: found {found}; {time.perf_counter() - began:.0f} s on {summary()}; {verdict(told)}")


def written(case: Case, name: str, changes: dict[str, Any], folder: Path) -> Path:
    """The recipe with changes, as a file of that name."""
    settings = [f"{key}={json.dumps(value)}" for key, value in (case.settings | changes).items()]
    file = folder / f"{name}.toml"
    tables = config.load(case.recipe, settings).tables
    kept = {
        n: {k: x for k, x in table.items() if x is not None}
        for n, table in tables.items()
        if n not in ("expected", "published")
    }
    file.write_text(tomli_w.dumps(kept))
    return file


def verdict(told: dict[str, Any]) -> str:
    """Whether the tuned recipe is within a standard error of the shipped one, or better, by their paired difference."""
    pair = next(p for p in told["pairs"] if {p["first"], p["second"]} == {"tuned", "shipped"})
    low, high = pair["over_episodes"]
    sign = 1 if (pair["first"] == "tuned") == told["more_is_better"] else -1
    better, error = sign * pair["difference"], (high - low) / (2 * 1.96)
    within = "within one standard error of the shipped one, or better" if better >= -error else "worse than the shipped one"
    return f"tuned is {better:+.4f} better (standard error {error:.4f}): {within}"


def most(least: int, number: float) -> int:
    return max(least, round(number))


def run(threads: int, *words: object) -> None:
    command = [str(word) for word in words]
    CONSOLE.print(f"metaoptim {shlex.join(command)}")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "metaoptim", *command], check=True, env=environment)


if __name__ == "__main__":
    main()
