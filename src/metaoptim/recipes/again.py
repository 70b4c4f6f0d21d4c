"""The command that trains a recipe's run again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from metaoptim.recipes import recipe as config
from metaoptim.recipes.recipe import Recipe


def command(recipe: Recipe, file: str | Path) -> str:
    """The command line, with what differs from the recipe that ships under this name; where none does, of its file."""
    if recipe.name not in config.names():
        return shlex.join(["metaoptim", "train", str(file)])
    shipped = config.load(recipe.name)
    settings = []
    for key in (key for key in recipe.differences(shipped) if not key.startswith("evaluate.")):
        table, _, option = key.partition(".")
        settings += ["--set", f"{key}={_toml(recipe.tables[table].get(option))}"]
    return shlex.join(["metaoptim", "train", recipe.name, *settings])


def _toml(value: Any) -> str:
    """A value as --set takes it, on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(x)}' for key, x in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps("none" if value is None else value)
