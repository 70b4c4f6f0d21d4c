"""Recipes of learned optimizers: an update rule, and the training problems that it learns on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from metaoptim import lopt, training
from metaoptim import runs as stored
from metaoptim.core.brief import nearest
from metaoptim.core.checks import check_counts
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.estimators import unguarded
from metaoptim.lopt.data import load
from metaoptim.lopt.families import FAMILIES
from metaoptim.lopt.judge import check_asked, check_tuned, finals, judged_families, own_families
from metaoptim.lopt.learner import Optimizee
from metaoptim.lopt.mixture import Family
from metaoptim.lopt.training import joined, learned_optimizer, streams
from metaoptim.recipes import code, parts
from metaoptim.recipes.experiment import NOT_IN_RECIPES, Evaluation, Scores, Tables, engine_options
from metaoptim.recipes.places import is_code
from metaoptim.recipes.schema import REQUIRED, ConfigError, Option, check, options
from metaoptim.runs import Run
from metaoptim.tasks.base import check_seed, digest_episodes
from metaoptim.training.callbacks import OnStep

if TYPE_CHECKING:
    from metaoptim.recipes.recipe import Recipe
    from metaoptim.report.html.document import Section

RULES = "what is learnt: lstm, small_fc, celo2, or another rule that has something to learn; a list is a chain."
ESTIMATORS = f"how the meta-gradient is obtained: {', '.join(parts.PARTS['estimator'])}."
MEMBERS = "tables like [tasks], of which each names a family; all with the same steps."
PES = {"name": "pes", "window": 10, "sigma": 0.01}
CHANGES = ("steps", "rescaled", "logarithm")  # which any family can have
FEW = 10  # steps: central differences go through a run several times for each number of ψ
IN_PYTHON = (
    "this run was started in Python, from code that no recipe names: load it there, by run = mo.load(RUN, method), with "
    "method = mo.lopt.learned_optimizer(rule, problems, estimator); mo.lopt.evaluate(run) then judges it, and "
    "mo.optim.from_run(run).save(FILE) exports it."
)
IN_ALGORITHM = ("estimator", "window", "sigma", "pairs", "objective")


@dataclass(frozen=True)
class LearnedOptimizers:
    """A rule, an estimator and families of training problems; see `Experiment`."""

    recipe: Recipe
    given: Family | None = None
    builders: ClassVar[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
        "algorithm": {"learned_optimizer": learned_optimizer},
        "tasks": {**FAMILIES, "mixture": lopt.mixture},
    }
    own: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "tasks": (("stretch", "training", "judged"), "a family of training problems, such as mo.lopt.quadratics makes"),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "model": "a learned optimizer has no [model], for the networks that it trains are those of [tasks]; leave [model] out.",
        "adapt": "adapt takes few-shot runs, and this one is of a learned optimizer: export it, and train with it.",
        "recommend": "recommend knows few-shot recipes; this one is of a learned optimizer, and of those too few were tried.",
        "diagnose": "diagnose looks into few-shot runs, and this one is of a learned optimizer: evaluate it.",
    }

    shared: ClassVar[Sequence[str]] = ("families", "problems", "seeds", "steps", "seed")

    @classmethod
    def refuse_unnamed(cls, learner: Any) -> None:
        """Errors: ConfigError, for the run of such a learner, as it is described, whose recipe names no algorithm."""
        if isinstance(learner, Mapping) and learner.get("kind") == Optimizee.__name__:
            raise ConfigError(IN_PYTHON)

    @classmethod
    def options(cls, table: str, name: str) -> list[Option]:
        if table == "algorithm":
            rules = Option("rule", parts.WRITTEN | list[parts.WRITTEN], REQUIRED, RULES)
            judged = next(option for option in parts.OPTIONS if option.name == "objective")
            return [rules, Option("estimator", parts.WRITTEN, dict(PES), ESTIMATORS), judged]
        if table == "tasks":
            return _family_options(name)
        if table == "engine":
            return engine_options()
        if table == "evaluate":
            known = options(lopt.evaluate, keyword_only=True)
        else:
            trained = {o.name: o for o in options(training.train, keyword_only=True) if o.name != "tasks_per_step"}
            here = {o.name: o for o in options(lopt.meta_train, keyword_only=True) if o.name not in IN_ALGORITHM}
            known = list((here | {n: o for n, o in trained.items() if n not in here}).values())
        return [o for o in known if o.name not in NOT_IN_RECIPES]

    @classmethod
    def resolved(cls, tables: Tables) -> Tables:
        tasks, judged = dict(tables["tasks"]), tables["evaluate"]
        counts = {n: judged[n] for n in ("problems", "seeds", "steps", "step_sizes")}
        try:
            check_asked(judged["baselines"], judged["seed"], **counts)
        except ValueError as error:
            raise ConfigError(f"[evaluate]: {error}") from error
        if tasks["name"] == "mixture":
            tasks["families"] = [_resolved_family(table) for table in tasks["families"]]
        return tables | {"algorithm": parts.resolved(tables["algorithm"]), "tasks": tasks}

    @cached_property
    def method(self) -> MetaOptimizer:
        keys, seed = parts.built(self.recipe.tables["algorithm"]), self.recipe.tables["train"]["seed"]
        check_seed(seed)
        return learned_optimizer(keys["rule"], self.tasks, keys["estimator"], seed, objective=keys["objective"])

    @cached_property
    def tasks(self) -> Family:
        return self._family(self.recipe.tables["tasks"]) if self.given is None else self.given

    def _family(self, table: Mapping[str, Any]) -> Family:
        keys = dict(table)
        name = keys.pop("name")
        if is_code(name):
            return cast(Family, code.build(name, keys, *self.own["tasks"]))
        if name == "mixture":
            return lopt.mixture(*(self._family(one) for one in keys["families"]))
        build = FAMILIES[name]
        if "data" in keys:
            keys["data"] = load(keys["data"], keys.pop("size"), keys.pop("root"))
        keys["rescaled"] = tuple(keys["rescaled"])
        taken = signature(build).parameters
        family = joined(build(**{n: x for n, x in keys.items() if n in taken}))
        return family.with_(**{n: x for n, x in keys.items() if n not in taken})

    @property
    def checked(self) -> tuple[MetaOptimizer, Family]:
        window = getattr(unguarded(self.method.estimator), "window", 1)
        one = self.with_tasks(self.tasks.with_(steps=min(self.tasks.steps, -(-FEW // window) * window)))
        return one.method, one.tasks

    @property
    def count(self) -> int:
        return cast(int, self.recipe.tables["train"]["problems_per_step"])

    @property
    def modules(self) -> Sequence[str]:
        return ["metaoptim.lopt.training", "metaoptim.lopt.judge", *parts.modules(self.recipe.tables["algorithm"])]

    def with_tasks(self, tasks: Any) -> LearnedOptimizers:
        return LearnedOptimizers(self.recipe, tasks)

    def batch(self) -> Task:
        options = self.recipe.tables["train"]
        check_counts(problems_per_step=self.count)
        return streams(self.method, options["seed"], self.count, options["horizons"])(0, self.method.phi)

    def train(
        self, out: str | Path, *, resume: bool = False, progress: bool = True, on_step: OnStep | None = None
    ) -> Run:  # fmt: skip
        tables, tasks = self.recipe.tables, self.tasks
        keys = parts.built(tables["algorithm"])
        check_tuned(keys["rule"], tables["evaluate"]["tuned"])
        return lopt.meta_train(
            keys["rule"], tasks, estimator=keys["estimator"], objective=keys["objective"], **tables["train"], out=out,
            resume=resume, engine=tables["engine"], recipe=self.recipe.text(), progress=progress, on_step=on_step,
        )  # fmt: skip

    def load(self, path: str | Path, which: Literal["best", "last"] = "best") -> Run:
        return stored.load(path, self.method, which)

    def score(self, run: Run, steps: int | None = None, where: str = "split val") -> Scores:
        tables = self.recipe.tables
        length = tables["evaluate"]["steps"] if steps is None else steps
        episodes, seed = tables["train"]["validate_episodes"], tables["evaluate"]["seed"]
        values, length = finals(run, problems=episodes, seed=seed, steps=length)
        told = f"{self.tasks.name}, {where}, runs of {length} steps, {episodes} problems of seed {seed}"
        return Scores("loss", (length,), values.unsqueeze(1), told)

    def evaluate(self, runs: Sequence[Run], *, progress: bool = True) -> lopt.Judgement:
        return lopt.evaluate(runs, **self.recipe.tables["evaluate"], progress=progress)

    def first_episodes(self) -> str:
        options, digest = self.recipe.tables["evaluate"], hashlib.sha256()
        for family in judged_families(options["families"], own_families(self.tasks), options["steps"]).values():
            digest_episodes(digest, family.sample("test", seed=options["seed"], start=0, count=1))
        return digest.hexdigest()

    def draw(self, found: Evaluation, runs: Sequence[Run], path: Path) -> None:
        cast(lopt.Judgement, found).draw(path)

    def scored(self, result: Mapping[str, Any]) -> Sequence[Section]:
        from metaoptim.report.html import optimizers

        return optimizers.sections(result)

    def gallery(self, run: Run, result: Mapping[str, Any] | None) -> Sequence[Section]:
        return ()


def _family_options(name: str) -> list[Option]:
    """What a family is built with: its data, the arguments of its builder, and what any family can be changed to."""
    if is_code(name):
        return code.options_of(name)
    if name == "mixture":
        return [Option("families", list[dict[str, Any]], REQUIRED, MEMBERS)]
    build = FAMILIES[name]
    data = [o._replace(name="data") if o.name == "name" else o for o in options(load)]
    own = [*(data if "data" in signature(build).parameters else []), *options(build)]
    names = {o.name for o in own}
    return [*own, *(o for o in options(lopt.Problems) if o.name in CHANGES and o.name not in names)]


def _resolved_family(table: Mapping[str, Any]) -> dict[str, Any]:
    """A member of a mixture with all its options."""
    keys = dict(table)
    name = keys.pop("name", None)
    if name is None:
        raise ConfigError(f"missing key `name` in [[tasks.families]]; expected one of: {', '.join(FAMILIES)}.")
    if not isinstance(name, str) or not (name in FAMILIES or is_code(name)):
        raise ConfigError(f"unknown family `{name}` in [[tasks.families]]{nearest(str(name), FAMILIES)}")
    return {"name": name, **check("tasks.families", keys, _family_options(name))}
