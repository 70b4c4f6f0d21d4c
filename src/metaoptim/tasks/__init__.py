"""Task families: where tasks come from."""

from __future__ import annotations

from collections.abc import Callable

from metaoptim.tasks.base import TaskFamily, episodes_hash
from metaoptim.tasks.cifar_fs import cifar_fs
from metaoptim.tasks.fertility import fertility
from metaoptim.tasks.folder import from_folder
from metaoptim.tasks.function import from_function
from metaoptim.tasks.glyphs import draw_letters, glyphs
from metaoptim.tasks.images import ImageTasks
from metaoptim.tasks.omniglot import omniglot
from metaoptim.tasks.sinusoid import sinusoid
from metaoptim.tasks.table import from_table

TASKS: dict[str, Callable[..., TaskFamily]] = {
    "sinusoid": sinusoid,
    "glyphs": glyphs,
    "omniglot": omniglot,
    "cifar_fs": cifar_fs,
    "fertility": fertility,
    "from_folder": from_folder,
    "from_table": from_table,
}
"""The families that recipes can name; the builders' keyword arguments are the keys of the table [tasks]."""

__all__ = [
    "TASKS",
    "ImageTasks",
    "TaskFamily",
    "cifar_fs",
    "draw_letters",
    "episodes_hash",
    "fertility",
    "from_folder",
    "from_function",
    "from_table",
    "glyphs",
    "omniglot",
    "sinusoid",
]
