"""What several commands share: options, the recipe of a run, and where they print."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Where data sets lie; else METAOPTIM_DATA, else a download.",
    ),
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Replace one option, as in algorithm.steps=5. Repeatable.",
    ),
]

Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="Where it is computed, as in cuda; the CPU if not given.")]


def use(data: Path | None) -> None:
    """Makes a folder the one in which data sets are looked for."""
    if data is not None:
        os.environ["METAOPTIM_DATA"] = str(data)


def recipe_of(run: Path) -> Path:
    """The recipe in the folder of a run; a ValueError where there is none."""
    path = run / "recipe.toml"
    if not path.is_file():
        raise ValueError(f"there is no {path}; expected the folder of a run that `metaoptim train` wrote.")
    return path


def console(stderr: bool = False) -> Console:
    """For results, or for progress on stderr; plain and 120 columns wide if it is no terminal."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 120
    return Console(stderr=stderr, force_terminal=terminal, width=width, markup=False, emoji=False, highlight=False)
