"""A strategy that was tried on some tasks, as a recipe for others."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from metaoptim.core.brief import nearest
from metaoptim.core.types import Task
from metaoptim.design.history import Row, tasks_key
from metaoptim.recipes import recipe as config
from metaoptim.recipes.recipe import Recipe
from metaoptim.recipes.schema import ConfigError
from metaoptim.runs.checkpoint import strict_json
from metaoptim.tasks import TASKS

PLAIN = {"batching": "loop", "memory": "graph", "runtime": "eager"}


def wanted(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe whose [tasks] and [model] are meant: by its name or file; for the name of a family, MAML with a usual model.

    The usual model is `conv4` with 32 filters for images, else an `mlp` with two hidden layers of 40.
    Errors: ConfigError; those of building the tasks, where a family is named.
    """
    name = str(name_or_path)
    if name not in TASKS:
        _check_known(name)
        return config.load(name_or_path, overrides)
    tables: dict[str, dict[str, Any]] = {"tasks": {"name": name}, "train": {"iterations": 1000}}
    tables |= {"algorithm": {"name": "maml", "loss": "mse"}, "model": {"name": "mlp"}}
    family = config.parse(tomli_w.dumps(tables), name, [o for o in overrides if o.startswith("tasks.")]).experiment().tasks
    task = family.sample("train", seed=0, start=0, count=1)
    tables |= _usual(task)
    return config.parse(tomli_w.dumps(tables), name, overrides)


def _check_known(name: str) -> None:
    """A ConfigError for a name that is neither that of a recipe nor of a file, with the nearest one that can be meant."""
    if name in config.names() or Path(name).exists() or Path(f"{name}.toml").exists() or name != Path(name).stem:
        return
    recipes = [one for one in config.names() if "recommend" not in config.load(one).kind.refused]
    raise ConfigError(f"unknown task family or recipe `{name}`{nearest(name, [*TASKS, *recipes], 'metaoptim list')}")


def _usual(task: Task) -> dict[str, dict[str, Any]]:
    x, y = task.support
    classes = not y.is_floating_point()
    wide = int(y.max()) + 1 if classes else y[0, 0].numel()
    algorithm = {"name": "maml", "loss": "cross_entropy" if classes else "mse"}
    if x.ndim == 5:  # [T, S, C, H, W]
        return {
            "algorithm": algorithm,
            "model": {"name": "conv4", "ways": wide, "channels": x.shape[2], "size": x.shape[-1], "filters": 32},
        }
    return {"algorithm": algorithm, "model": {"name": "mlp", "sizes": [x[0, 0].numel(), 40, 40, wide]}}


KEPT = ("seed", "device")
BUDGET = ("iterations", "validate_every", "validate_episodes", "checkpoint_every", "log_every", "check")
"""Options of [train] that a recipe keeps: its own ones, and where a strategy was tried within a budget."""


def moved(row: Row, rows: Sequence[Row], target: Recipe) -> Recipe:
    """The algorithm and the training of a row, on the tasks and with the model of `target`, judged as that one is.

    Where the row's model differs from the one that most strategies had on its family, as in warp layers, so does the new one;
    on the very tasks of a search also in what that has varied. rows: those of its family among others.
    Errors: ValueError, where these don't go together.
    """
    tables = {name: dict(table) for name, table in row.trial.tables.items()}
    theirs = [other.trial.tables["model"] for other in rows if other.family == row.family]
    here = tasks_key(tables["tasks"]) == tasks_key(target.tables["tasks"])
    counts = Counter(strict_json(model, sort_keys=True) for model in theirs)
    common = next(model for model in theirs if strict_json(model, sort_keys=True) == counts.most_common(1)[0][0])
    others = theirs if here and row.trial.source == "tune" else [common]
    own = {key: x for key, x in tables["model"].items() if any(other.get(key) != x for other in others)}
    if strange := [key for key in own if key not in target.tables["model"]]:
        raise ConfigError(f"the model of {target.name} has no option {strange[0]}, which {row.trial.recipe} needs.")
    # What is fitted to a search or to a budget is no part of a strategy.
    kept = KEPT if row.trial.source == "reproduce" else (*KEPT, *BUDGET)
    steps = row.trial.steps if row.trial.source == "tune" else tables["evaluate"].get("steps")
    made = {
        "algorithm": tables["algorithm"] | {"loss": target.tables["algorithm"]["loss"]},
        "model": target.tables["model"] | own,
        "tasks": target.tables["tasks"] | _shots(tables["tasks"], target.tables["tasks"]),
        "train": tables["train"] | {key: target.tables["train"][key] for key in kept},
        "evaluate": target.tables["evaluate"] | {"steps": steps},
        "engine": {key: x for key, x in target.tables["engine"].items() if key != "choice"},
    }
    algorithm = made["algorithm"]["name"]
    told = f"{algorithm} on the tasks of {target.name}, with the settings of {row.trial.recipe}"
    recipe = Recipe(f"{target.name}-{algorithm}", told, made)
    return config.parse(recipe.text(), recipe.name)


def _shots(theirs: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The shots in training of a strategy that wants others there than at judging, as many times as many."""
    more, shots = theirs.get("train_shots"), theirs.get("shots")
    if more is None or not shots or "train_shots" not in tasks or not tasks.get("shots"):
        return {"train_shots": None} if "train_shots" in tasks else {}
    return {"train_shots": round(tasks["shots"] * more / shots)}


def goes(recipe: Recipe) -> str:
    """Trains a recipe for one outer step on two tasks, and says what stops it, "" for nothing."""
    tables = {name: dict(table) for name, table in recipe.tables.items()}
    tables["train"] |= {"iterations": 1, "tasks_per_step": 2, "validate_every": 0, "check": False}
    tables["engine"] |= PLAIN
    try:
        with tempfile.TemporaryDirectory() as folder:
            Recipe(recipe.name, "", tables).experiment().train(Path(folder, "run"), progress=False)
    except (ValueError, RuntimeError, OSError) as error:  # torch says RuntimeError of shapes that don't fit
        return str(error)
    return ""
