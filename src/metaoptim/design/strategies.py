"""What a strategy is like, read from its recipe: the four choices of a meta-optimizer, its step sizes, its budget, its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from metaoptim.core.types import MetaOptimizer
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Tables
from metaoptim.recipes.recipe import Recipe
from metaoptim.recipes.schema import REQUIRED

NOWHERE = "(not recorded)"
Strategy = dict[str, float | str]


def rebuilt(name: str, tables: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial's tables, which lack where data lie. Errors: ConfigError, where they are no recipe of today's."""
    given: Tables = {table: dict(keys) for table, keys in tables.items()}
    first = Recipe(name, "", given)
    if any(o.name == "root" and o.default is REQUIRED for o in first.kind.options("tasks", given["tasks"]["name"])):
        given["tasks"].setdefault("root", NOWHERE)
    return config.parse(first.text(), name)


def strategy(recipe: Recipe) -> Strategy:
    """Describes a few-shot recipe, without a look at data.

    - `algorithm`: its name. `learner`, `rule`: the classes that it is made of. `estimator`: what its gradient is claimed to be.
    - `adapts`: the share of the weights that the inner loop moves.
    - `steps`, `test_steps`: log(1 + K) in training and at judging.
    - `inner_lr`, `outer_lr`: log10 of the step sizes, that of a range being its geometric middle (NaN: it has none).
    - `budget`: log10 of the tasks that training sees, iterations · T.
    - `weights`, `rule_size`: log10(1 + how many numbers θ and ψ have).

    Errors: ValueError, for tables of which nothing can be built.
    """
    experiment, tables = recipe.experiment(), recipe.tables
    method, train = experiment.method, tables["train"]
    weights = method.phi.weights
    size = sum(w.numel() for w in weights.values())
    steps = tables["evaluate"].get("steps")
    outer = train.get("lr")
    return {
        "algorithm": method.name if method.name != "custom" else str(tables["algorithm"]["name"]),
        "learner": type(method.learner).__name__,
        "rule": type(getattr(method.learner, "rule", None)).__name__,
        "estimator": method.estimator.claim,
        "adapts": sum(weights[name].numel() for name in method.adapting) / size,
        "steps": math.log1p(method.learner.steps),
        "test_steps": math.log1p(method.learner.steps if steps is None else steps),
        "inner_lr": _inner(tables["algorithm"]),
        "outer_lr": math.log10(method.outer.lr if outer is None else outer),
        "budget": math.log10(train["iterations"] * experiment.count),
        "weights": math.log10(1 + size),
        "rule_size": math.log10(1 + _size(method)),
    }


def _inner(algorithm: Mapping[str, Any]) -> float:
    rule = algorithm.get("rule")
    nested = rule if isinstance(rule, Mapping) else {}
    for table in (algorithm, nested):
        if isinstance(lr := table.get("lr"), int | float) and lr > 0:
            return math.log10(lr)
        if {"low", "high"} <= table.keys() and min(table["low"], table["high"]) > 0:
            return (math.log10(table["low"]) + math.log10(table["high"])) / 2
    return math.nan


def _size(method: MetaOptimizer) -> int:
    return sum(p.numel() for p in method.phi.rule.values())
