"""What is compared: recipes that are trained here, and runs that are taken as they are, under names that tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from metaoptim.core.brief import brief
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Experiment
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs import Run
from metaoptim.runs.run import warn_unless_finished
from metaoptim.runs.store import RECIPE

BESIDE = ("train.seed", "train.device", "tasks.root")  # options in which trainings of one method may differ
TRAINED = ("train.", "engine.")  # options that say nothing of a run that is there already
BUILT = ("algorithm.", "model.", "tasks.")  # options that may make another method of it
FEW = 2  # options that a name can hold
RUNS, JUDGED = "runs", "judged"  # folders of a comparison


@dataclass(frozen=True)
class Contender:
    """A method: recipes that differ in their seed alone, and for each the folder where its run is, or will be.

    runs: those that are there already, and are used as they are. source: the file or the folder, without its path.
    """

    name: str
    source: str
    recipes: tuple[Recipe, ...]
    folders: tuple[Path, ...]
    runs: tuple[Run, ...] = field(default=(), repr=False)

    @property
    def given(self) -> bool:
        """Whether it was trained before."""
        return bool(self.runs)

    @property
    def recipe(self) -> Recipe:
        """That of the first seed."""
        return self.recipes[0]

    @cached_property
    def experiment(self) -> Experiment:
        """Of the first seed."""
        return self.recipe.experiment()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the trainings."""
        return tuple(recipe.tables["train"]["seed"] for recipe in self.recipes)

    @property
    def iterations(self) -> int:
        """Outer steps of each training."""
        return int(self.recipe.tables["train"]["iterations"])

    def load(self) -> tuple[Run, ...]:
        """The runs of all its seeds from their folders, each with its best φ by validation."""
        found = tuple(one.experiment().load(folder) for one, folder in zip(self.recipes, self.folders, strict=True))
        for run in found:
            warn_unless_finished(run, self.iterations)
        return found

    def changed(self, table: str, options: dict[str, Any]) -> Contender:
        """The same with other options in a table of all its recipes."""
        changed = (replace(one, tables=one.tables | {table: one.tables[table] | options}) for one in self.recipes)
        return replace(self, recipes=tuple(changed))


def gather(what: Sequence[str | Path | Run], seeds: Sequence[int] | None, settings: Sequence[str]) -> list[Contender]:
    """Recipes with every seed (their own where none are given), and runs that differ in their seed alone as one; the folders of
    recipes are their names, as yet.

    settings: options that replace others; a run stays as it was trained, whatever they say of training.

    Errors: ConfigError, for a recipe that can't be read; ValueError, for fewer than two methods, or for one given twice.
    """
    found: list[Contender] = []
    told: list[str | Path] = []
    for given in what:
        one = given.path if isinstance(given, Run) else given
        if not isinstance(one, str | Path):
            raise ValueError(
                f"compare takes names of recipes, TOML files and folders of runs; found {brief(given)}"
                f"{', which is in no folder: train it with out=' if isinstance(given, Run) else ''}."
            )
        new = _contender(one, seeds, settings)
        same = next((i for i, known in enumerate(found) if not _differences(known.recipe, new.recipe)), None)
        if same is None:
            found.append(new)
            told.append(one)
            continue
        known = found[same]
        if {*known.seeds} & {*new.seeds} or not (known.given and new.given):
            raise ValueError(_twice(told[same], one, known, new))
        joined = {part: getattr(known, part) + getattr(new, part) for part in ("recipes", "folders", "runs")}
        found[same] = replace(known, **joined)
    if len(found) < 2:
        raise ValueError(
            f"there is nothing to compare {found[0].name if found else 'it'} with; give two methods or more, as recipes or as "
            "folders of runs (runs that differ in their seed alone are one method)."
        )
    if (vain := [one for one in settings if _of_training(one)]) and all(one.given for one in found):
        raise ValueError(f"--set {vain[0]} says how to train, but all that is given is trained already; leave it out.")
    return [replace(one, name=name) for one, name in zip(found, _names(found), strict=True)]


def _contender(what: str | Path, seeds: Sequence[int] | None, settings: Sequence[str]) -> Contender:
    """A recipe with its seeds, or one run, as it was trained."""
    folder = _run(what)
    if folder is None:
        recipe = config.load(what, settings)
        own = seeds or [recipe.tables["train"]["seed"]]
        recipes = tuple(config.load(what, [*settings, f"train.seed={seed}"]) for seed in own)
        return Contender(recipe.name, Path(what).stem, recipes, ())
    recipe = config.load(folder / RECIPE, [one for one in settings if not _of_training(one)])
    found = Contender(recipe.name, folder.name, (recipe,), (folder,))
    try:
        return replace(found, runs=found.load())
    except ValueError as error:
        told = " ".join(f"--set {one}" for one in settings if one.strip().startswith(BUILT))
        if not told:
            raise
        raise ValueError(
            f"{told} can't alter {what}, which is trained already; leave it out, or give the run's recipe in its place: {error}"
        ) from error


def _of_training(setting: str) -> bool:
    """Whether it says how to train, and not where that is computed."""
    key = setting.partition("=")[0].strip()
    return key.startswith(TRAINED) and key != "train.device"


def _twice(first: str | Path, second: str | Path, known: Contender, new: Contender) -> str:
    """Why two of what was given can't be compared, for they are one method, and what to give instead."""
    told = f"{second} is given twice" if first == second else f"{first} and {second} are the same but for name and seed"
    advice = "give one alone, and more trainings of it by seeds"
    if not {*known.seeds} & {*new.seeds}:
        seeds = ", ".join(map(str, sorted(known.seeds + new.seeds)))
        advice += f" (seeds {seeds} join as one method where all of them are runs)"
    return f"{told}, so that there is nothing to compare; {advice}."


def placed(contenders: Sequence[Contender], folder: Path) -> list[Contender]:
    """The same, and what is trained here has a folder for each of its seeds in the comparison's."""
    return [
        one
        if one.given
        else replace(one, folders=tuple(folder / RUNS / f"{config.file_name(one.name)}-s{seed}" for seed in one.seeds))
        for one in contenders
    ]


def judged_beside(run: Path) -> Path:
    """Where the comparison that has trained this run keeps what it judged of all seeds of its method."""
    return run.parent.parent / JUDGED / run.name.rpartition("-s")[0]


def on_the_same_episodes(contenders: Sequence[Contender]) -> list[Contender]:
    """The same, all judged as the first one's [evaluate] says, but for their own options, such as inner steps.

    ValueError where they can't be: kinds that have nothing in common, or other tasks.
    """
    first = contenders[0]
    kind, options = first.recipe.kind, first.recipe.tables["evaluate"]
    if others := [one for one in contenders if one.recipe.kind is not kind]:
        raise ValueError(
            f"{first.name} and {others[0].name} have nothing to be compared by: one adapts a model to a few examples, the "
            "other is a learned optimizer; compare either with its like."
        )
    alike = [one.changed("evaluate", {key: options[key] for key in kind.shared}) for one in contenders]
    episodes = alike[0].experiment.first_episodes()
    for one in alike[1:]:
        if one.experiment.first_episodes() != episodes:
            reasons = [key for key in alike[0].recipe.differences(one.recipe) if key.startswith(("tasks.", "algorithm.loss"))]
            told = f" (they differ in {', '.join(reasons)})" if reasons else ""
            raise ValueError(
                f"{first.name} and {one.name} are judged on different episodes or by different losses{told}, so that their "
                "scores can't be compared; give methods for the same tasks."
            )
    return alike


def _run(what: str | Path) -> Path | None:
    """The folder of a run; None for what is a recipe."""
    folder = Path(what)
    if str(what) in config.names() or not folder.is_dir():
        return None
    if not (folder / RECIPE).is_file():
        raise ValueError(
            f"there is no {folder / RECIPE}; expected the folder of a run that `metaoptim train` wrote, or a recipe."
        )
    return folder


def _differences(one: Recipe, other: Recipe) -> list[str]:
    """The options in which two recipes differ as methods: what all are judged by alike is none of them."""
    alike = (*BESIDE, *(f"evaluate.{key}" for key in one.kind.shared))
    return [key for key in one.differences(other) if key not in alike]


def _names(contenders: Sequence[Contender]) -> Iterator[str]:
    """Names that tell methods apart: those of one name by a few options in which they differ, by their files, or by numbers."""
    taken: set[str] = set()
    for one in contenders:
        alike = [other for other in contenders if other.name == one.name and other is not one]
        options = dict.fromkeys(key for other in alike for key in _differences(one.recipe, other.recipe))
        told = one.source if alike and one.source != one.name else ""
        values = {key: one.recipe.tables[key.split(".")[0]].get(key.split(".", 1)[1]) for key in options}
        if 0 < len(values) <= FEW and all(isinstance(x, bool | int | float | str) for x in values.values()):
            told = ", ".join(f"{key.split('.', 1)[1]}={x}" for key, x in values.items())
        first = f"{one.name} ({told})" if told else one.name
        name, number = first, 2
        while name in taken:
            name, number = f"{first} #{number}", number + 1
        taken.add(name)
        yield name
