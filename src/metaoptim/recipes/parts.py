"""The parts of a composed algorithm in a recipe: a rule, an estimator, an objective, by name or as a table with options.

    rule = {name = "adam", lr = 0.01}        rule = [{name = "clip", norm = 1.0}, {name = "sgd", lr = 0.1}]

A list is a chain. As everywhere in recipes, the arguments of what is named are the options. A rule or an estimator may be
code of the user's own, FILE.py:NAME.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaoptim import estimators, lopt, rules
from metaoptim.algorithms.alfa import Generated
from metaoptim.algorithms.meta_curvature import Curvature
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.core import objectives
from metaoptim.core.brief import nearest
from metaoptim.recipes import code
from metaoptim.recipes.places import is_code
from metaoptim.recipes.schema import REQUIRED, ConfigError, Option, check, found, options, spell

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "rule": {
        "sgd": rules.SGD,
        "momentum": rules.Momentum,
        "nesterov": rules.Nesterov,
        "rmsprop": rules.RMSprop,
        "adam": rules.Adam,
        "adamw": rules.AdamW,
        "muon": rules.Muon,
        "soap": rules.SOAP,
        "schedule_free_adamw": rules.ScheduleFreeAdamW,
        "sgd_hd": rules.sgd_hd,
        "adam_hd": rules.adam_hd,
        "clip": rules.Clip,
        "schedule": rules.Schedule,
        "step_sizes": StepSizes,
        "average": rules.Average,
        "layer_step_sizes": rules.LayerStepSizes,
        "curvature": Curvature,
        "alfa": Generated,
        "lstm": lopt.LSTM,
        "small_fc": lopt.SmallFC,
        "celo2": lopt.Celo2,
    },
    "estimator": {
        "unroll": estimators.Unroll,
        "displacement": estimators.Displacement,
        "implicit": estimators.Implicit,
        "truncated": estimators.Truncated,
        "last_steps": estimators.LastSteps,
        "sama": estimators.SAMA,
        "finite_differences": estimators.FiniteDifferences,
        "joint": estimators.Joint,
        "truncated_es": estimators.truncated_es,
        "pes": estimators.pes,
        "nres": estimators.nres,
    },
    "objective": {**objectives.OBJECTIVES},
}
OWN = {
    "rule": (("start", "init", "update"), "a rule, with start, init and update"),
    "estimator": (("claim", "init", "inherit"), "an estimator, with claim, init, inherit and a call"),
}
"""What code of the user's own must have to be one of these."""
WRITTEN = str | dict[str, Any]
OPTIONS = [
    Option("rule", WRITTEN | list[WRITTEN], REQUIRED, f"how weights move: {', '.join(PARTS['rule'])}; a list is a chain."),
    Option("estimator", WRITTEN, "unroll", f"how the meta-gradient is obtained: {', '.join(PARTS['estimator'])}."),
    Option("objective", WRITTEN | None, None, f"what the outer loss reads of a run: {', '.join(PARTS['objective'])}."),
]


def resolved(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table in which every part has all of its options. Errors: ConfigError."""
    return {key: _resolved(key, value) if key in PARTS and value is not None else value for key, value in table.items()}


def built(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table that `resolved` returned, with objects in place of the parts."""
    return {key: _built(key, value) if key in PARTS and value is not None else value for key, value in table.items()}


def modules(table: Mapping[str, Any]) -> list[str]:
    """The modules of the library in which the parts of a resolved table are defined."""
    named = [(kind, one["name"]) for kind in PARTS for one in _each(table.get(kind))]
    return [PARTS[kind][name].__module__ for kind, name in named if not is_code(name)]


def _each(part: Any) -> list[Any]:
    return part if isinstance(part, list) else [] if part is None else [part]


def _resolved(kind: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(kind, part) for part in value]
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name, known = given.pop("name", None), PARTS[kind]
    if name is None:
        raise ConfigError(f"`{kind}` in [algorithm]: found {found(value)}, expected a name in it: {', '.join(known)}.")
    if kind in OWN and is_code(name):
        own = code.options_of(name)
    elif name in known:
        own = options(known[name])
    else:
        raise ConfigError(f"unknown {kind} `{name}` in [algorithm]{nearest(str(name), known)}")
    if isinstance(value, str) and (needed := [option for option in own if option.default is REQUIRED]):
        keys = ", ".join(f"{option.name} = …" for option in needed)
        raise ConfigError(
            f"missing key `{needed[0].name}` in [algorithm.{kind}]; expected {spell(needed[0].type)}: write "
            f'{kind} = {{name = "{name}", {keys}}}.'
        )
    return {"name": name, **check(f"algorithm.{kind}", given, own)}


def _built(kind: str, value: Any) -> Any:
    if isinstance(value, list):
        return rules.chain(*(_built(kind, part) for part in value))
    name, keys = value["name"], {key: x for key, x in value.items() if key != "name"}
    return code.build(name, keys, *OWN[kind]) if is_code(name) else PARTS[kind][name](**keys)
