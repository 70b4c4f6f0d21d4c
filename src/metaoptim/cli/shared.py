"""What several commands share: options, the recipe of a run, and where they print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """The recipe in a run's folder; ValueError where there is none."""
    path = run / "recipe.toml"
    if not path.is_file():
        raise ValueError(f"there is no {path}; expected the folder of a run that `metaoptim train` wrote.")
    return path


def numbers(seeds: str | None) -> Sequence[int] | None:
    """Seeds with commas between them; ValueError for anything else."""
    if seeds is None:
        return None
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--seeds {seeds}: expected whole numbers with commas between them, each once, as in 0,1,2.")
    return [int(part) for part in parts]


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done, with a function that says which part of it: a line now and then where there is no
    terminal."""
    from metaoptim.runs.progress import QUIET_SECONDS

    screen, spoken = console(stderr=True), time.monotonic()
    with screen.status(what) as status:

        def say(text: str) -> None:
            nonlocal spoken
            status.update(f"{what}: {text}")
            if not screen.is_terminal and time.monotonic() - spoken > QUIET_SECONDS:
                screen.print(f"{what}: {text}")
                spoken = time.monotonic()

        yield say


def console(stderr: bool = False) -> Console:
    """For results, or for progress on stderr; plain and 120 columns wide if it is no terminal."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 120
    return Console(stderr=stderr, force_terminal=terminal, width=width, markup=False, emoji=False, highlight=False)
