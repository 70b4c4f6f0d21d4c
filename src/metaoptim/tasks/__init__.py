"""Task families: where tasks come from."""

from __future__ import annotations

from collections.abc import Callable

from metaoptim.tasks.base import TaskFamily, episodes_hash
from metaoptim.tasks.function import from_function
from metaoptim.tasks.glyphs import draw_letters, glyphs
from metaoptim.tasks.images import ImageTasks
from metaoptim.tasks.omniglot import omniglot
from metaoptim.tasks.sinusoid import sinusoid

TASKS: dict[str, Callable[..., TaskFamily]] = {"sinusoid": sinusoid, "glyphs": glyphs, "omniglot": omniglot}
"""The families that recipes can name; the builders' keyword arguments are the keys of the table [tasks]."""

__all__ = [
    "TASKS",
    "ImageTasks",
    "TaskFamily",
    "draw_letters",
    "episodes_hash",
    "from_function",
    "glyphs",
    "omniglot",
    "sinusoid",
]
