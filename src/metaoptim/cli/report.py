"""The command `report`: one page about runs, which a browser opens without a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, recipe_of, use


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; report.html in the first folder if not given.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Write it again as metrics come, until training ends.")] = False,
    set_: Settings = None,
    data: Data = None,
) -> None:
    """Write a page about runs: scores, curves, episodes, diagnosis and provenance in one file.

    Nothing is evaluated: what is missing is named, with the command that makes it. A run that was started from Python may need
    names for its code, as in --set model.name=my.py:Net.
    """
    with quitting():
        from metaoptim.design import live as watching
        from metaoptim.design.report import page
        from metaoptim.report.html.render import render
        from metaoptim.runs.store import write_atomic

    use(data)
    for run in runs:
        recipe_of(run)
    path = runs[0] / "report.html" if out is None else out
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file, as in --out {path / 'report.html'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = tuple(set_ or ())

    def write(unfinished: bool) -> None:
        write_atomic(path, render(page(watching.opened(runs, settings), unfinished)).encode())

    try:
        if live:
            typer.echo(
                f"The page is {path}; it loads itself again until training ends. Ctrl-C ends this command alone.", err=True
            )
            watching.follow(runs, write)
    except KeyboardInterrupt:
        write(False)  # so that the page stops loading itself again
        again = shlex.join(["metaoptim", "report", *map(str, runs), "--out", str(path), "--live"])
        typer.echo(f"{path} shows what there was. To go on: {again}", err=True)
        raise
    write(False)
    typer.echo(f"The page is {path}.")
