"""metaoptim: algorithms that learn how to learn.

Names are loaded when first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaoptim import estimators, learners, losses, nn, objectives, rules, tasks
    from metaoptim.algorithms import *
    from metaoptim.design import check as check
    from metaoptim.engine import Engine as Engine
    from metaoptim.loop import *
    from metaoptim.types import Meta as Meta
    from metaoptim.types import MetaOptimizer as MetaOptimizer
    from metaoptim.types import Task as Task

_MODULES = ("losses", "nn", "tasks", "rules", "learners", "estimators", "objectives")
_NAMES = {
    "metaoptim.algorithms": ("ALGORITHMS",),
    "metaoptim.design": ("check",),
    "metaoptim.engine": ("Engine",),
    "metaoptim.loop": ("MetaModule", "Run", "evaluate", "load", "meta_train", "train"),
    "metaoptim.types": ("Meta", "MetaOptimizer", "Task"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}

try:
    __version__ = version("metaoptim")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"metaoptim.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    # A module of the package that is being imported for the first time must not be looked for among the algorithms.
    if not name.startswith("_") and find_spec(f"metaoptim.{name}") is None:
        algorithms = import_module("metaoptim.algorithms").ALGORITHMS
        if name in algorithms:
            return algorithms[name]
    raise AttributeError(f"module 'metaoptim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_HOME, *import_module("metaoptim.algorithms").ALGORITHMS, "__version__"])
