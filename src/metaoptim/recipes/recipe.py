"""Recipes: TOML files that name an algorithm, a model and tasks, and say how to train and evaluate.

The keyword arguments of the builders, of `train` and of `evaluate` ARE the schema: a new option can be
used in a recipe, is checked, and is shown by the command line, without any other change. The algorithm decides which
kind of experiment a recipe is of, and so which tables it has.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w

from metaoptim.core.brief import nearest
from metaoptim.core.callers import warn
from metaoptim.core.types import MetaOptimizer
from metaoptim.recipes import code, places
from metaoptim.recipes.experiment import Experiment, Tables
from metaoptim.recipes.few_shot import FewShot
from metaoptim.recipes.learned_optimizers import LearnedOptimizers
from metaoptim.recipes.schema import NONE, ConfigError, check, found, spell
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import RECIPE
from metaoptim.tasks import TaskFamily

KINDS: tuple[type[Experiment], ...] = (FewShot, LearnedOptimizers)
_OWN = ("model", "tasks")  # which may be code of the user's own
_OPTIONS = ("algorithm", *_OWN, "train", "evaluate", "engine")
_NOTES = ("expected", "published", "described")  # for people and for the ledger: training never reads them
_TABLES = (*_OPTIONS, *_NOTES)
_MOVED = tuple(f"tasks.{key}" for key in places.DATA)  # data may be moved: a run knows its own by what they are
_BESIDE = {("train", "seed"), ("tasks", "root"), ("engine", "choice")}  # of which the seed is a number of its own


@dataclass(frozen=True)
class Recipe:
    """A recipe with every option filled in; `tables` holds all its TOML tables by name."""

    name: str
    description: str
    tables: Tables

    @property
    def kind(self) -> type[Experiment]:
        """What kind of experiment it is of."""
        return _kind_of(self.tables["algorithm"]["name"])

    @property
    def content(self) -> Tables:
        """What it says of training and evaluation, but for the seed, where data lie, and what the engine has measured."""
        return {
            name: {key: value for key, value in self.tables[name].items() if (name, key) not in _BESIDE}
            for name in _OPTIONS
            if name in self.tables
        }

    @property
    def content_hash(self) -> str:
        """Of `content`, 12 digits."""
        return hashlib.sha256(strict_json(self.content, sort_keys=True).encode()).hexdigest()[:12]

    def experiment(self, command: str = "") -> Experiment:
        """What there is to train and to judge. Errors: ConfigError for a command that its kind doesn't have."""
        if command in self.kind.refused:
            raise ConfigError(self.kind.refused[command])
        return self.kind(self)

    def text(self, absent: bool = True) -> str:
        """The recipe as TOML, with every option written out; reading it gives the same recipe.

        absent: whether options that are absent stand there too, as "none".
        """
        tables = {n: {k: x for k, x in table.items() if absent or x is not None} for n, table in self.tables.items()}
        return tomli_w.dumps({"name": self.name, "description": self.description, **_written(tables)})

    def replaced(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, by their keys, as in {"algorithm.lr": 0.3, "algorithm.estimator.sigma": 0.1}.

        Errors: ConfigError, for a key or a value that can't be.
        """
        data = tomllib.loads(self.text())
        for path, value in values.items():
            *tables, key = path.split(".")
            inner = data
            for table in tables:
                inner = inner.setdefault(table, {})
            inner[key] = _written(value)
        return _resolve(data, self.name, [Path.cwd()])

    def lying_in(self, folder: Path) -> Recipe:
        """The same with code of the user's own, and where data lie, named as seen from a folder, for a file there."""
        return replace(self, tables=places.seen_from(self.tables, folder))

    def build(self) -> tuple[MetaOptimizer, TaskFamily]:
        """The meta-optimizer and its tasks; the same recipe gives the same φ, whatever torch has drawn before."""
        experiment = self.experiment()
        tasks = experiment.tasks
        return experiment.method, tasks

    def differences(self, other: Recipe) -> list[str]:
        """The options, as `table.key`, in which two recipes differ, but for what the engine has measured."""
        return [
            f"{table}.{key}"
            for table in _OPTIONS
            for mine, theirs in [(self.tables.get(table, {}), other.tables.get(table, {}))]
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key) and (table, key) != ("engine", "choice")
        ]


def _written(value: Any) -> Any:
    """A value as TOML can hold it."""
    if isinstance(value, Mapping):
        return {key: _written(x) for key, x in value.items()}
    return [_written(x) for x in value] if isinstance(value, list) else NONE if value is None else value


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(_shipped())


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by its name or from a TOML file; overrides replace options, as in `algorithm.steps=5`.

    The model's `ways`, if it takes them, default to those of the tasks. Code that an override names takes the place of a model
    or of tasks, whose options that it doesn't have are left out, with a warning.
    Errors: ConfigError, for whatever is wrong with the name, the text or an option.
    """
    source = _find(str(name_or_path))
    try:
        text = source.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name_or_path} isn't UTF-8 text; expected a TOML file.") from error
    try:
        beside = places.folders(source) if isinstance(source, Path) and str(name_or_path) not in names() else ()
        return parse(text, source.name.removesuffix(".toml"), overrides, beside)
    except ConfigError as error:
        raise ConfigError(f"{name_or_path}: {error}") from error


def given(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by its name, its file or itself; overrides and errors as in `load`."""
    return parse(recipe.text(), recipe.name, overrides) if isinstance(recipe, Recipe) else load(recipe, overrides)


def parse(text: str, name: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> Recipe:
    """A recipe from TOML text, as in `load`; `name` is used if the text doesn't state one.

    folders: where the files that it names are, if they are not in the current one.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}.") from error
    if not data:
        raise ConfigError(
            "this recipe is empty; expected tables [algorithm], [model], [tasks] and [train] (a run that was started from "
            "Python and names none of them is judged there, with metaoptim.evaluate)."
        )
    here = Path.cwd()
    data = places.found(data, [*folders, here])
    before = {name: dict(table) for name in _OWN if isinstance(table := data.get(name), dict)}
    for override in overrides:
        _replace(data, override)
    for table in before:
        data[table] = _without_rest(table, before[table], data[table], [here, *folders])
    return _resolve(data, name, [here, *folders])


def file_name(name: str) -> str:
    """A name of a recipe, or of a method, as that of a file."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def check_same(recipe: Recipe, folder: Path, free: Sequence[str]) -> None:
    """Raises a ValueError where a folder's run was started by another recipe, but for [evaluate] and options that are free;
    where there is none, nothing is said."""
    stored = folder / RECIPE
    known = recipe.differences(load(stored)) if stored.is_file() else []
    if changed := [key for key in known if not key.startswith("evaluate.") and key not in (*free, *_MOVED)]:
        raise ValueError(
            f"the run in {folder} was started with other values of {', '.join(changed)}; resume it with the "
            "same ones, or start a new run in another folder (--out)."
        )


def builders(table: str) -> list[str]:
    """What the `name` in a table may be, in recipes of any kind."""
    return list(dict.fromkeys(name for kind in KINDS for name in kind.builders.get(table, {})))


def _shipped() -> dict[str, Traversable]:
    folder = resources.files("metaoptim") / "recipes"
    return {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}


def _find(name: str) -> Traversable:
    shipped, path = _shipped(), Path(name)
    if name in shipped:
        return shipped[name]
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a TOML file (a run has its recipe.toml) or a recipe's name.")
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise ConfigError(f"there is no file {name}; expected a TOML file, or a recipe that `metaoptim list` names.")
    if Path(f"{name}.toml").is_file():
        raise ConfigError(f"unknown recipe `{name}`; did you mean the file {name}.toml?")
    raise ConfigError(f"unknown recipe `{name}`{nearest(name, shipped, 'metaoptim list recipes')}")


def _replace(data: dict[str, Any], override: str) -> None:
    target, equals, text = (part.strip() for part in override.partition("="))
    table, _, key = target.partition(".")
    if not (table and key and equals):
        raise ConfigError(f"can't set `{override}`; expected TABLE.KEY=VALUE, as in algorithm.steps=5.")
    if inner := key.partition(".")[2]:
        whole = f"{table}.{key.partition('.')[0]}=" + (text if inner == "name" else f"{{name = …, {inner} = {text}}}")
        raise ConfigError(f"can't set `{override}`, a key inside an option; set all of that, as in {whole}.")
    if table not in _TABLES:
        raise ConfigError(f"unknown table `{table}` in `{override}`{nearest(table, _TABLES)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word
    if isinstance(keys := data.setdefault(table, {}), dict):
        keys[key] = value


def _without_rest(table: str, before: Mapping[str, Any], now: Any, within: Sequence[Path]) -> Any:
    """A table in which code has taken another builder's place, without the options of that one alone."""
    own, name = before.get("name"), now.get("name") if isinstance(now, dict) else None
    if own is None or own == name or not places.is_code(name):
        return now
    known = {"name", *(option.name for option in code.options_of(places.code(name, within)))}
    rest = [key for key in before if key not in known and now.get(key) == before[key]]
    if rest:
        left = f"{', '.join(rest)} {'is' if len(rest) == 1 else 'are'} left out"
        warn(f"[{table}]: {name} takes the place of {own}, so that {left}.")
    return {key: value for key, value in now.items() if key not in rest}


def _resolve(data: dict[str, Any], name: str, within: Sequence[Path]) -> Recipe:
    for key, value in data.items():
        if key not in ("name", "description", *_TABLES):
            what = "table" if isinstance(value, dict) else "key"
            raise ConfigError(f"unknown {what} `{key}`{nearest(key, ('name', 'description', *_TABLES))}")
        if not isinstance(value, dict if key in _TABLES else str):
            expected = f"a table, [{key}]" if key in _TABLES else spell(str)
            raise ConfigError(f"`{key}`: found {found(value)}, expected {expected}.")
    given = {table: dict(keys) for table, keys in places.found({t: data.get(t, {}) for t in _TABLES}, within).items()}
    if "name" not in given["algorithm"]:
        LearnedOptimizers.refuse_unnamed(given["described"].get("method", {}).get("learner"))
    algorithm = _chosen("algorithm", given["algorithm"].pop("name", None), builders("algorithm"))
    kind = _kind_of(algorithm)
    if vain := [table for table in data if table in kind.refused]:
        raise ConfigError(kind.refused[vain[0]])
    chosen = {"algorithm": algorithm} | {
        table: _chosen(table, given[table].pop("name", None), [*kind.builders[table]]) for table in kind.own
    }
    known = {table: kind.options(table, chosen.get(table, "")) for table in _OPTIONS if table not in kind.refused}
    tasks = check("tasks", given["tasks"], known["tasks"])
    if "ways" in tasks and any(o.name == "ways" for o in known.get("model", ())):
        given["model"].setdefault("ways", tasks["ways"])
    composed = {o.name for o in kind.options("algorithm", "compose")} if "compose" in kind.builders["algorithm"] else set()
    tables = kind.resolved(
        {
            table: ({"name": chosen[table]} if table in chosen else {})
            | check(table, given[table], options, composed if table == "algorithm" else ())
            for table, options in known.items()
        }
    )
    tables |= {name: given[name] for name in _NOTES if name == "expected" or given[name]}
    return Recipe(data.get("name", name), data.get("description", ""), tables)


def _kind_of(algorithm: str) -> type[Experiment]:
    return next(kind for kind in KINDS if algorithm in kind.builders["algorithm"])


def _chosen(table: str, name: Any, known: Sequence[str]) -> str:
    if table in _OWN and places.is_code(name):
        return name
    if table in _OWN and isinstance(name, str) and name.endswith(".py"):
        raise ConfigError(f"`name` in [{table}]: {name} is a file alone; expected {code.NAMED}, as in {name}:NAME.")
    if name is None:
        own = f", or {code.NAMED} of your own" if table in _OWN else ""
        raise ConfigError(f"missing key `name` in [{table}]; expected one of: {', '.join(known)}{own}.")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"unknown {table} `{name}` in [{table}]{nearest(str(name), known)}")
    return name
