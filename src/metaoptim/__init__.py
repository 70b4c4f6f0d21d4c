"""metaoptim: algorithms that learn how to learn.

Names are loaded when first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaoptim import estimators, learners, lopt, nn, optim, reductions, rules, tasks
    from metaoptim.algorithms import *
    from metaoptim.core import losses, objectives
    from metaoptim.core.types import MetaOptimizer as MetaOptimizer
    from metaoptim.core.types import MetaParams as MetaParams
    from metaoptim.core.types import Task as Task
    from metaoptim.design import *
    from metaoptim.diagnosis import *
    from metaoptim.engine import Engine as Engine
    from metaoptim.evaluation import *
    from metaoptim.gradcheck import check as check
    from metaoptim.gradcheck import compare_estimators as compare_estimators
    from metaoptim.runs import *
    from metaoptim.training import *

_MODULES = {
    "estimators": "metaoptim.estimators",
    "learners": "metaoptim.learners",
    "lopt": "metaoptim.lopt",
    "losses": "metaoptim.core.losses",
    "nn": "metaoptim.nn",
    "objectives": "metaoptim.core.objectives",
    "optim": "metaoptim.optim",
    "reductions": "metaoptim.reductions",
    "rules": "metaoptim.rules",
    "tasks": "metaoptim.tasks",
}
_NAMES = {
    "metaoptim.algorithms": ("ALGORITHMS", "compose"),
    "metaoptim.core.types": ("MetaOptimizer", "MetaParams", "Task"),
    "metaoptim.design": ("compare", "recommend", "tune"),
    "metaoptim.diagnosis": ("diagnose",),
    "metaoptim.engine": ("Engine",),
    "metaoptim.evaluation": ("evaluate",),
    "metaoptim.gradcheck": ("check", "compare_estimators"),
    "metaoptim.runs": ("Run", "load"),
    "metaoptim.training": ("MetaModule", "bilevel", "hypergradient", "meta_train", "train"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    # A module of the package that is being imported for the first time must not be looked for among the algorithms.
    if not name.startswith("_") and find_spec(f"metaoptim.{name}") is None:
        algorithms = import_module("metaoptim.algorithms").ALGORITHMS
        if name in algorithms:
            return algorithms[name]
    raise AttributeError(f"module 'metaoptim' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # here, because importing it takes longer than all the rest

    try:
        return version("metaoptim")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_HOME, *import_module("metaoptim.algorithms").ALGORITHMS, "__version__"])
