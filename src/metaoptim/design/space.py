"""What is searched: ranges and choices of a recipe's keys, written as in `algorithm.lr=log:0.01..1`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, cast, get_args

from metaoptim.core.brief import nearest
from metaoptim.core.checks import SMALLEST
from metaoptim.recipes.recipe import Recipe
from metaoptim.recipes.schema import ConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial as Drawn

FORMS = "a range, as in 1..10 or 0.001..0.01 or log:0.01..1, or choices, as in true|false or 16|32|64"
TABLES = ("algorithm", "model", "train", "evaluate")
FIXED = {
    "seed": "a seed that did best did so by chance",
    "device": "scores don't depend on it",
    "iterations": "how long trials train is --iterations",
    "validate_episodes": "it says how scores are measured",
}
"""Keys of [train] that decide what a score means, or nothing of it, and why they aren't searched."""
TEST_STEPS = "evaluate.steps"
SIZES = ("algorithm.lr", "algorithm.rule.lr", "train.lr")
"""Step sizes of the inner loop, by themselves or of a composed rule, and of the outer one."""
STEPS, WIDTH = (1, 10), 10.0  # of the default space: inner steps, and the factor by which step sizes are less or more


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high`, both included; `whole` ones, or any; evenly, or evenly in the logarithm."""

    low: float
    high: float
    whole: bool = False
    log: bool = False

    @property
    def ends(self) -> list[Any]:
        """The smallest and the largest."""
        return [self.low, self.high]

    def suggested(self, drawn: Drawn, key: str) -> Any:
        """What Optuna draws for a key."""
        if self.whole:
            return drawn.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return drawn.suggest_float(key, self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> Any:
        """What a recipe is given for what was drawn."""
        return drawn

    def drawn(self, value: Any) -> Any:
        """What would have been drawn for a recipe's value; None where it is not in here."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        inside = number and self.low <= value <= self.high and (not self.whole or float(value).is_integer())
        return (int(value) if self.whole else float(value)) if inside else None

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> list[Any]:
        """All of them."""
        return list(self.values)

    def suggested(self, drawn: Drawn, key: str) -> Any:
        """What Optuna draws for a key: a value's text, for lists are among them."""
        return drawn.suggest_categorical(key, [_text(value) for value in self.values])

    def value(self, drawn: Any) -> Any:
        """What a recipe is given for what was drawn."""
        return next(value for value in self.values if _text(value) == drawn)

    def drawn(self, value: Any) -> Any:
        """What would have been drawn for a recipe's value; None where it is not in here."""
        return _text(value) if _text(value) in map(_text, self.values) else None

    def __str__(self) -> str:
        return "|".join(map(_text, self.values))


Dimension = Span | Choice
Space = dict[str, Dimension]
"""What is searched, by key, as in "algorithm.lr"."""


def grid(space: Space, most: int) -> list[dict[str, Any]]:
    """All points of a space, as they are drawn; [] where it has more than so many, or no end of them."""
    known = {key: d for key, d in space.items() if key != TEST_STEPS}
    sizes = [len(d.values) if isinstance(d, Choice) else d.high - d.low + 1 if d.whole else math.inf for d in known.values()]
    if math.prod(sizes) > most:
        return []
    values = [d.values if isinstance(d, Choice) else range(int(d.low), int(d.high) + 1) for d in known.values()]
    drawn = [[d.drawn(value) for value in own] for d, own in zip(known.values(), values, strict=True)]
    return [dict(zip(known, point, strict=True)) for point in product(*drawn)]


def space_of(recipe: Recipe, searched: Mapping[str, Any] | Sequence[str] | None) -> Space:
    """The space that is asked for, or the default one; ConfigError for what can't be searched in this recipe.

    searched: specs by key, or texts KEY=SPEC; a spec is a text, or a list of choices.
    """
    if not searched:
        return default(recipe)
    pairs = searched.items() if isinstance(searched, Mapping) else map(_halves, searched)
    space: Space = {}
    for key, spec in pairs:
        if key in space:
            raise ConfigError(f"`{key}` is searched twice; give it one range, or choices.")
        known = _checked_key(recipe, key)
        dimension = Choice(tuple(spec)) if isinstance(spec, list | tuple) else parsed(key, spec)
        space[key] = _as_floats(dimension) if known is not None and _is_float(known) else dimension
        for value in space[key].ends:
            recipe.replaced({key: value})
    return space


def default(recipe: Recipe) -> Space:
    """What nearly every recipe depends on, as far as it has them: inner steps 1 to 10, inner and outer step size (that of a
    composed rule, if it is one) from a tenth to ten times of what they are, and first or second order where the algorithm has
    both."""
    algorithm, space = recipe.tables["algorithm"], cast(Space, {})
    if isinstance(algorithm.get("steps"), int) and algorithm["steps"] > 0:
        space["algorithm.steps"] = Span(*STEPS, whole=True)
    for key in SIZES:
        size = value_of(recipe, key)
        if isinstance(size, int | float) and size > 0:
            space[key] = Span(float(f"{size / WIDTH:.6g}"), float(f"{size * WIDTH:.6g}"), log=True)
    if isinstance(algorithm.get("first_order"), bool):
        space["algorithm.first_order"] = Choice((False, True))
    return space


def value_of(recipe: Recipe, key: str) -> Any:
    """A recipe's own value of a key, None where it has none; of an outer step size that it leaves to the algorithm, that."""
    here: Any = recipe.tables
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return recipe.experiment().method.outer.lr if here is None and key == "train.lr" else here


def parsed(key: str, spec: Any) -> Dimension:
    """A range or choices from their text. Errors: ConfigError."""
    if not isinstance(spec, str):
        raise ConfigError(f"{key}: found {spec!r}, expected a text or a list: {FORMS}.")
    told = f"{key}={spec}"
    if ".." in spec:
        log, _, rest = spec.rpartition("log:")
        ends = [_toml(end) for end in rest.split("..", 1)]
        if log or not all(isinstance(e, int | float) and not isinstance(e, bool) and math.isfinite(e) for e in ends):
            raise ConfigError(f"{told}: expected {FORMS}.")
        low, high = ends
        if low >= high:
            raise ConfigError(f"{told}: its first number must be less than its second one.")
        if spec.startswith("log:") and low < SMALLEST:
            raise ConfigError(f"{told}: a logarithmic range begins above 0.")
        return Span(low, high, all(isinstance(end, int) for end in ends), spec.startswith("log:"))
    values = tuple(_toml(part) for part in spec.split("|"))
    if len(values) < 2:
        raise ConfigError(f"{told}: there is nothing to search; expected {FORMS}. One value is given by --set {told}.")
    if len(set(map(_text, values))) < len(values) or "" in values:
        raise ConfigError(f"{told}: its choices must be different, and none of them empty.")
    return Choice(values)


def _halves(text: str) -> tuple[str, str]:
    key, equals, spec = text.partition("=")
    if not (key.strip() and equals):
        raise ConfigError(f"can't search `{text}`; expected TABLE.KEY=SPEC, as in algorithm.steps=1..10.")
    return key.strip(), spec.strip()


def _checked_key(recipe: Recipe, key: str) -> Any:
    """The type of a key that can be searched (None: not known); ConfigError for any other."""
    table, _, rest = key.partition(".")
    if table == "tasks":
        raise ConfigError(f"`{key}` can't be searched: scores of different tasks can't be compared; set it by --set.")
    known = [name for name in TABLES if name in recipe.tables]
    if table not in known or not rest:
        raise ConfigError(f"can't search `{key}`: {_unknown_table(table, known)}")
    if table == "train" and rest in FIXED:
        raise ConfigError(f"`{key}` can't be searched, for {FIXED[rest]}.")
    if table == "evaluate" and key != TEST_STEPS:
        why = "it says how scores are measured"
        raise ConfigError(f"`{key}` can't be searched, for {why}; of [evaluate], {TEST_STEPS} alone can.")
    first, *inner = rest.split(".")
    options = {o.name: o.type for o in recipe.kind.options(table, recipe.tables[table].get("name", ""))}
    options |= {"name": str} if table == "algorithm" else {}  # such as maml|fomaml
    if first not in options:
        raise ConfigError(f"unknown key `{first}` in [{table}]{nearest(first, options)}")
    here: Any = recipe.tables[table].get(first)
    for name in inner:
        if not isinstance(here, dict) or name not in here:
            among = nearest(name, here) if isinstance(here, dict) else f": `{first}` has no keys of its own."
            raise ConfigError(f"unknown key `{name}` in `{key}`{among}")
        here = here[name]
    return (type(here) if here is not None else None) if inner else options[first]


def _unknown_table(table: str, known: Sequence[str]) -> str:
    return f"unknown table `{table}`{nearest(table, known)}"


def _is_float(kind: Any) -> bool:
    kinds = get_args(kind) or (kind,)
    return float in kinds and int not in kinds


def _as_floats(dimension: Dimension) -> Dimension:
    """As a key wants it whose values are no whole numbers: 1..10 are all numbers between."""
    return Span(float(dimension.low), float(dimension.high), False, dimension.log) if isinstance(dimension, Span) else dimension


def _toml(text: str) -> Any:
    """A TOML value, or a bare word."""
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _text(value: Any) -> str:
    """A value as it is written and told."""
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
