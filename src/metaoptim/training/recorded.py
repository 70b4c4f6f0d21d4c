"""The recipe of a run that was started from Python: every part that can be named, and a description of all of it."""

from __future__ import annotations

import inspect
import itertools
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import tomli_w
import torch
from torch import nn

from metaoptim.algorithms import ALGORITHMS
from metaoptim.core.losses import LOSSES
from metaoptim.core.types import MetaOptimizer
from metaoptim.engine import Choice, chosen
from metaoptim.learners import network_of
from metaoptim.nn import MODELS
from metaoptim.runs import identity
from metaoptim.runs.store import RECIPE, RunDirectory
from metaoptim.tasks import TASKS
from metaoptim.tasks.base import LOCATION

HEAD = "# Started from Python. What could be named is in the tables of a recipe; all of it is described in [described].\n"
NAMES = "# What lacks a name gets one on the command line, as in: metaoptim evaluate RUN --set model.name=my.py:Net\n"
IN_PYTHON = "# To judge it, load it in Python, with its method built anew: metaoptim.load(RUN, method)\n"


def recorded(
    known: Mapping[str, Any], method: MetaOptimizer, settings: Mapping[str, Any], engine: Mapping[str, Any] | None,
    given: str | Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """TOML text. Tables that are given win over those that are found; a text is kept as it is.

    known: the run's identity; settings: the arguments of `train`, of which names, numbers and tables can be written.
    """
    if isinstance(given, str):
        return given
    network = network_of(method.learner)
    tables = {
        "algorithm": named_algorithm(method),
        "model": named_module(network.net) if network else {},
        "tasks": named_tasks(known["tasks"]),
        "train": {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str | np.generic | Mapping)},
        "engine": dict(engine or {}),
    }
    for name, table in (given or {}).items():
        tables[name] = {**tables.get(name, {}), **table} if isinstance(table, Mapping) else table
    return HEAD + (NAMES if network else IN_PYTHON) + tomli_w.dumps(_toml({"name": method.name, **tables, "described": known}))


def keep_choice(directory: RunDirectory, choice: Choice) -> None:
    """Writes what the engine has measured into the run's recipe: training that again gives the same floats."""
    text = directory.read(RECIPE)
    with suppress(tomllib.TOMLDecodeError):  # a text of the user's own
        tables = tomllib.loads(text)
        tables.setdefault("engine", {})["choice"] = choice.text
        comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        directory.write(RECIPE, comments + tomli_w.dumps(tables))


def kept_choice(directory: RunDirectory) -> Choice | None:
    """What `keep_choice` has written, which a kill can have left without a checkpoint."""
    with suppress(tomllib.TOMLDecodeError, ValueError):
        text = tomllib.loads(directory.read(RECIPE)).get("engine", {}).get("choice", "none")
        return None if text == "none" else chosen(text)
    return None


def named_algorithm(method: MetaOptimizer) -> dict[str, Any]:
    """The algorithm and the options that build this method again; {} where none is found that does."""
    build, network, wanted = ALGORITHMS.get(method.name), network_of(method.learner), identity.of_method(method)
    loss = named_loss(network.loss) if network else ""
    if build is None or network is None or not loss:
        return {}
    values = dict(_leaves(wanted))
    choices = [_choices(p, values) for p in _options(build)]
    for picked in itertools.product(*choices):
        options = {p.name: value for p, value in zip(_options(build), picked, strict=True)}
        again = _quietly(partial(build, network.net, network.loss, **options))
        if again is not None and again.outer == method.outer and identity.of_method(again) == wanted:
            return {"name": method.name, "loss": loss, **options}
    return {}


def named_loss(loss: Any) -> str:
    """The name of one of the library's losses, or FILE.py:NAME of a function of the user's own; "" where it has neither."""
    name = getattr(loss, "__name__", "")
    if LOSSES.get(name) is loss:
        return str(name)
    file = _file_of(loss) if inspect.isfunction(loss) and name.isidentifier() else None
    return f"{file}:{name}" if file else ""


def named_module(net: nn.Module) -> dict[str, Any]:
    """One of `metaoptim.nn`'s models with its options, or FILE.py:NAME of a module's class and the arguments that it keeps as
    attributes; {} where they don't build it again."""
    kind = type(net)
    if built := dict(getattr(net, "built_by", {})):
        again = _quietly(lambda: MODELS[built["name"]](**{k: v for k, v in built.items() if k != "name"}))
        return built if again is not None and identity.described(again) == identity.described(net) else {}
    file = _file_of(kind)
    if file is None:
        return {}
    options = {p.name: getattr(net, p.name) for p in _parameters(kind) if _writable(getattr(net, p.name, None))}
    again = _quietly(lambda: kind(**options))
    same = again is not None and identity.described(again) == identity.described(net)
    return {"name": f"{file}:{kind.__name__}", **options} if same else {}


def named_tasks(known: Mapping[str, Any]) -> dict[str, Any]:
    """The family and its options, of one that recipes know."""
    family = str(known.get("family", ""))
    if family not in TASKS:
        return {}
    names = {p.name for p in _parameters(TASKS[family])}
    options = {**known.get("options", {}), **known.get(LOCATION, {})}
    return {"name": family, **{k: v for k, v in options.items() if k in names}}


def _file_of(kind: Any) -> str | None:
    """The file of a class or function of the user's own, as seen from this folder."""
    library = kind.__module__.partition(".")[0] in ("torch", "metaoptim", "torchvision", "builtins")
    if library or "." in kind.__qualname__:
        return None
    with suppress(OSError, TypeError, ValueError):
        return str(Path(inspect.getfile(kind)).resolve().relative_to(Path.cwd()))
    return None


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The plain values of a description by their own names, those that come first last, so that a dictionary keeps them."""
    for key, value in reversed(list(tree.items())):
        if isinstance(value, Mapping):
            yield from _leaves(value) if key != "net" else ()  # whose layers have names of their own
        elif not isinstance(value, list):
            yield key, value


def _choices(option: inspect.Parameter, values: Mapping[str, Any]) -> list[Any]:
    """The values that an option may have had: the one of that name in the description, else any that it is offered.

    A count that is not described was the default, or 0, by which what it counts is left out.
    """
    offered = list(get_args(option.annotation)) if get_origin(option.annotation) is Literal else []
    if option.name in values and (not offered or values[option.name] in offered):
        return [values[option.name]]
    left_out = {bool: [option.default, not option.default], bool | None: [None, False], int: [option.default, 0]}
    return offered or left_out.get(option.annotation, [option.default])


def _options(build: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(build, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _parameters(build: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(build).parameters.values())


def _quietly(build: Callable[[], Any]) -> Any:
    """What is built, without warnings and draws; None where it can't be."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), suppress(Exception):
        warnings.simplefilter("ignore")
        return build()
    return None


def _writable(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, list | tuple) and all(map(_writable, value)))


def _toml(value: Any) -> Any:
    """A value in TOML, which has no null and writes "none" for it."""
    if isinstance(value, Mapping):
        return {str(k): _toml(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_toml(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return "none" if value is None else value
