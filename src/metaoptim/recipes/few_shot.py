"""Recipes of meta-learners, which adapt a model to a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import torch
from torch import nn

from metaoptim import evaluation, training
from metaoptim import runs as stored
from metaoptim.algorithms import ALGORITHMS, compose
from metaoptim.core.checks import check_counts
from metaoptim.core.losses import LOSSES, Loss
from metaoptim.core.reductions import NAMED
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.evaluation.baselines import has_classes
from metaoptim.nn import MODELS
from metaoptim.recipes import code, parts
from metaoptim.recipes.experiment import NOT_IN_RECIPES, Evaluation, Scores, Tables, engine_options
from metaoptim.recipes.places import is_code
from metaoptim.recipes.schema import CODE, REQUIRED, Option, options
from metaoptim.runs import Run
from metaoptim.tasks import TASKS, ImageTasks, TaskFamily
from metaoptim.tasks.base import check_seed, episodes_hash
from metaoptim.training.callbacks import OnStep
from metaoptim.training.size import check_batch
from metaoptim.training.source import source_of

if TYPE_CHECKING:
    from metaoptim.recipes.recipe import Recipe
    from metaoptim.report.html.document import Section

FEW = 4  # episodes by whose hash others are known
SHOWN = 4  # episodes on a page


@dataclass(frozen=True)
class FewShot:
    """An algorithm, a model and tasks; see `Experiment`."""

    recipe: Recipe
    given: TaskFamily | None = None
    builders: ClassVar[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
        "algorithm": ALGORITHMS | {"compose": compose},
        "model": MODELS,
        "tasks": TASKS,
    }
    own: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "model": (nn.Module, "a torch.nn.Module"),
        "tasks": (("splits", "sample", "describe"), "a task family, such as mo.tasks.from_function makes"),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "export": "export takes runs of learned optimizers, and this one adapts a model: mo.load(RUN, method).adapt(support) "
        "returns the module, which torch saves."
    }

    shared: ClassVar[Sequence[str]] = ("split", "episodes", "seed")

    @classmethod
    def options(cls, table: str, name: str) -> list[Option]:
        if table == "algorithm":
            loss = Option("loss", Literal[tuple(LOSSES)] | CODE, REQUIRED, "what is minimised: a mean over examples.")
            known = [
                o._replace(type=o.type | CODE) if set(NAMED) <= set(get_args(o.type)) else o
                for o in options(cls.builders[table][name], keyword_only=True)
            ]
            if name != "compose":
                return [loss, *known]
            return [loss, *parts.OPTIONS, *(o for o in known if o.name not in ("name", *parts.PARTS))]
        if table in cls.builders:
            return code.options_of(name) if is_code(name) else options(cls.builders[table][name])
        if table == "engine":
            return engine_options()
        known = options(training.train if table == "train" else evaluation.evaluate, keyword_only=True)
        return [o for o in known if o.name not in NOT_IN_RECIPES]

    @classmethod
    def resolved(cls, tables: Tables) -> Tables:
        return tables | {"algorithm": parts.resolved(tables["algorithm"])}

    @cached_property
    def method(self) -> MetaOptimizer:
        """The meta-optimizer, without a look at any data; the same φ, whatever torch has drawn before."""
        tables = self.recipe.tables
        keys = parts.built(tables["algorithm"])
        build, loss = self.builders["algorithm"][keys.pop("name")], _loss(keys.pop("loss"))
        if is_code(own := keys.get("reduction")):
            keys["reduction"] = code.build(own, {}, ("weigh",), "a reduction, with weigh")
        check_seed(tables["train"]["seed"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tables["train"]["seed"])
            method: MetaOptimizer = build(self._built("model"), loss, **keys)
            return method

    @cached_property
    def tasks(self) -> TaskFamily:
        family: TaskFamily = self._built("tasks") if self.given is None else self.given
        return family

    @property
    def checked(self) -> tuple[MetaOptimizer, TaskFamily]:
        return self.method, self.tasks

    def _built(self, table: str) -> Any:
        keys = dict(self.recipe.tables[table])
        name = keys.pop("name")
        return code.build(name, keys, *self.own[table]) if is_code(name) else self.builders[table][name](**keys)

    @property
    def count(self) -> int:
        return cast(int, self.recipe.tables["train"]["tasks_per_step"])

    @property
    def modules(self) -> Sequence[str]:
        algorithm, tasks = self.recipe.tables["algorithm"], self.recipe.tables["tasks"]["name"]
        found = [self.builders["algorithm"][algorithm["name"]].__module__]
        found += [parts.__name__, *parts.modules(algorithm)] if algorithm["name"] == "compose" else []
        found += [NAMED[how].partition(":")[0]] if (how := algorithm.get("reduction")) in NAMED else []
        return [*found, TASKS[tasks].__module__] if tasks in TASKS else found

    def with_tasks(self, tasks: Any) -> FewShot:
        tables = self.recipe.tables
        if "classes" in tables["algorithm"] and isinstance(tasks, ImageTasks):  # a classifier of all training classes
            tables = tables | {"algorithm": tables["algorithm"] | {"classes": tasks.classes("train")}}
        return FewShot(replace(self.recipe, tables=tables), tasks)

    def batch(self) -> Task:
        seed = self.recipe.tables["train"]["seed"]
        check_counts(tasks_per_step=self.count)
        check_batch(self.tasks, seed, self.count)
        return source_of(self.method, self.tasks, seed, self.count)(0, self.method.phi)

    def train(
        self, out: str | Path, *, resume: bool = False, progress: bool = True, on_step: OnStep | None = None
    ) -> Run:  # fmt: skip
        tables, tasks = self.recipe.tables, self.tasks
        return training.train(
            self.method, tasks, **tables["train"], out=out, resume=resume, engine=tables["engine"], recipe=self.recipe.text(),
            progress=progress, on_step=on_step,
        )  # fmt: skip

    def load(self, path: str | Path, which: Literal["best", "last"] = "best") -> Run:
        return stored.load(path, self.method, which)

    def score(self, run: Run, steps: int | None = None, where: str = "split val") -> Scores:
        tables = self.recipe.tables
        asked = {key: tables["evaluate"][key] for key in ("steps", "normalisation", "seed", "device")}
        asked |= {"episodes": tables["train"]["validate_episodes"]} | ({} if steps is None else {"steps": steps})
        found = evaluation.evaluate(run, self.tasks, split="val", baselines=(), **asked, progress=False)
        values = found.rows[0].scores[found.metric]
        told = found.measured(where, f"after 0 to {values.shape[1] - 1} inner steps")
        return Scores(found.metric, tuple(range(values.shape[1])), values, told)

    def evaluate(self, runs: Sequence[Run], *, progress: bool = True) -> evaluation.Result:
        return evaluation.evaluate(list(runs), self.tasks, **self.recipe.tables["evaluate"], progress=progress)

    def first_episodes(self) -> str:
        options = self.recipe.tables["evaluate"]
        few, where = min(FEW, options["episodes"]), {"seed": options["seed"], "start": 0}
        found = episodes_hash(self.tasks, options["split"], **where, count=few)
        scored = has_classes(self.tasks.sample(options["split"], **where, count=1))  # by accuracy, whatever the loss
        return found if scored else f"{found} {self.recipe.tables['algorithm']['loss']}"

    def draw(self, found: Evaluation, runs: Sequence[Run], path: Path) -> None:
        from metaoptim.report import draw  # here, because matplotlib is slow to load

        draw(cast(evaluation.Result, found), runs[0], self.tasks, path)

    def scored(self, result: Mapping[str, Any]) -> Sequence[Section]:
        from metaoptim.report.html import few_shot

        return few_shot.sections(result)

    def gallery(self, run: Run, result: Mapping[str, Any] | None) -> Sequence[Section]:
        from metaoptim.report.html.gallery import gallery

        asked = self.recipe.tables["evaluate"]
        steps = run.method.learner.steps if asked["steps"] is None else asked["steps"]
        where = (asked["split"], asked["seed"], steps)
        split, seed, steps = where if result is None else (result["split"], result["episode_seed"], result["steps"])
        return [gallery(run, self.tasks.sample(split, seed=seed, start=0, count=SHOWN), steps)]


def _loss(name: str) -> Loss:
    """A loss by its name, or one of the user's own."""
    return code.function(name, "a function of (output, target) that returns a number") if is_code(name) else LOSSES[name]
