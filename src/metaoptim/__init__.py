"""metaoptim: algorithms that learn how to learn.

Names are loaded when first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaoptim import estimators, learners, losses, nn, objectives, rules, tasks
    from metaoptim.algorithms import *
    from metaoptim.engine import Engine
    from metaoptim.loop import *
    from metaoptim.types import Meta, MetaOptimizer, Task

_MODULES = ("losses", "nn", "tasks", "rules", "learners", "estimators", "objectives")
_NAMES = {
    "metaoptim.algorithms": (
        "ALGORITHMS", "article_maml", "article_reptile", "fomaml", "maml", "meta_sgd", "reptile",
    ),
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
    raise AttributeError(f"module 'metaoptim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_HOME, "__version__"])
