"""What the recipes of every kind offer to commands, which therefore need not know of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from rich.table import Table
from torch import Tensor

from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.engine import SETTINGS, Engine
from metaoptim.recipes.schema import Option, options
from metaoptim.runs import Run
from metaoptim.tasks import TaskFamily
from metaoptim.training.callbacks import OnStep

if TYPE_CHECKING:
    from metaoptim.recipes.recipe import Recipe
    from metaoptim.report.html.document import Section

Tables = dict[str, dict[str, Any]]
"""The TOML tables of a recipe, by name."""

NOT_IN_RECIPES = ("out", "resume", "engine", "recipe", "progress")


class Evaluation(Protocol):
    """What was measured of a run, or of runs that differ in their seed."""

    @property
    def metric(self) -> str:
        """ "accuracy", of which more is better, or "loss", of which less is."""
        ...

    @property
    def mean(self) -> float: ...

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of the mean."""
        ...

    @property
    def scores(self) -> Tensor:
        """One number for each episode or problem, (E): evaluations with the same `episodes_sha256` can be paired."""
        ...

    @property
    def of_runs(self) -> Tensor:
        """The same of each run, (R, E), of which `scores` are the mean."""
        ...

    @property
    def beside(self) -> Mapping[str, tuple[float, float]]:
        """Mean and interval of each baseline, by name."""
        ...

    @property
    def protocol(self) -> str:
        """What it was measured on and how, in words."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What gives the numbers their meaning: `steps`, `episodes` and `episodes_sha256` among it."""
        ...

    def table(self, width: int = ...) -> Table: ...

    def save(self, folder: str | Path) -> Path:
        """Writes result.json, and returns its path."""
        ...


@dataclass(frozen=True)
class Scores:
    """What validation tells of a run: one number for each episode or problem, after each number of inner steps.

    Args:
        metric: "accuracy", of which more is better, or "loss", of which less is.
        steps: the numbers of inner steps at test, (C); one alone where a run is judged at its end only.
        values: (E, C).
        protocol: what it was measured on and how, in words.
    """

    metric: str
    steps: tuple[int, ...]
    values: Tensor = field(repr=False)
    protocol: str


class Experiment(Protocol):
    """A recipe of one kind: what may stand in its tables, and what is done with them."""

    builders: ClassVar[Mapping[str, Mapping[str, Callable[..., Any]]]]
    """The tables that choose something by `name`, and among what."""

    own: ClassVar[Mapping[str, tuple[Any, str]]]
    """The tables whose `name` may be code of the user's own: what that must be or have, and in words."""

    refused: ClassVar[Mapping[str, str]]
    """The tables and commands that this kind doesn't have, each with a sentence."""

    shared: ClassVar[Sequence[str]]
    """The options of [evaluate] that must be the same where evaluations are compared."""

    def __init__(self, recipe: Recipe) -> None: ...

    @classmethod
    def options(cls, table: str, name: str) -> list[Option]:
        """What may stand in a table; if it chooses by `name`, beside that name."""
        ...

    @classmethod
    def resolved(cls, tables: Tables) -> Tables:
        """Checked tables, with the options of what is nested in them. Errors: ConfigError."""
        ...

    @property
    def method(self) -> MetaOptimizer:
        """The meta-optimizer, whose φ is a function of the recipe alone."""
        ...

    @property
    def tasks(self) -> TaskFamily: ...

    @property
    def checked(self) -> tuple[MetaOptimizer, TaskFamily]:
        """Both for the gradient doctor, with inner runs that are short enough for it."""
        ...

    @property
    def count(self) -> int:
        """Tasks T of an outer step."""
        ...

    @property
    def modules(self) -> Sequence[str]:
        """The modules that its numbers come from, beside those of training and evaluation."""
        ...

    def with_tasks(self, tasks: Any) -> Experiment:
        """The same recipe on other tasks of its kind, such as a fold of its own."""
        ...

    def batch(self) -> Task:
        """The tasks of the first outer step. Errors: ValueError, for more than there is memory for."""
        ...

    def train(
        self, out: str | Path, *, resume: bool = False, progress: bool = True, on_step: OnStep | None = None
    ) -> Run:  # fmt: skip
        """Meta-trains; errors: those of `training.train`, whose `on_step` this is."""
        ...

    def load(self, path: str | Path, which: Literal["best", "last"] = "best") -> Run:
        """The run of this recipe in a folder. Errors: ValueError, for one of another."""
        ...

    def score(self, run: Run, steps: int | None = None, where: str = "split val") -> Scores:
        """Scores on split "val", on as many episodes as a validation of training takes and no baselines.

        steps: the most inner steps K at test; as [evaluate] says if not given. where: what that split is, for the protocol.
        """
        ...

    def evaluate(self, runs: Sequence[Run], *, progress: bool = True) -> Evaluation:
        """Judges a run, or runs that differ in their seed, as [evaluate] says."""
        ...

    def first_episodes(self) -> str:
        """A hash of the first episodes that `evaluate` judges on, and the loss where that is the score; where two are the same,
        scores can be paired."""
        ...

    def draw(self, found: Evaluation, runs: Sequence[Run], path: Path) -> None:
        """Writes a picture of what `evaluate` has found, a PNG."""
        ...

    def scored(self, result: Mapping[str, Any]) -> Sequence[Section]:
        """What its result.json says, as sections of a page: the headline beside the baselines, and what belongs to it."""
        ...

    def gallery(self, run: Run, result: Mapping[str, Any] | None) -> Sequence[Section]:
        """Some of what a run is judged on, as sections of a page, with its answers; () where `scored` shows all there is.

        result: its result.json, which says what it was judged on; none: it is taken from [evaluate]. Errors: ValueError.
        """
        ...


def engine_options() -> list[Option]:
    """What may stand in [engine]."""
    return [o for o in options(Engine) if o.name in SETTINGS]
