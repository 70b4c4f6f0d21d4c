"""The command `report`: one page about runs, which a browser opens without a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, use


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, of a comparison or of a search.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; report.html in the first folder if not given.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Write it again as metrics come, until training ends.")] = False,
    set_: Settings = None,
    data: Data = None,
) -> None:
    """Write a page about runs, a comparison or a search: scores, curves, episodes, diagnosis and provenance in one file.

    Nothing is evaluated: what is missing is named, with the command that makes it. A run that was started from Python may need
    names for its code, as in --set model.name=my.py:Net.
    """
    with quitting():
        from metaoptim.design import live as watching
        from metaoptim.design.folder import RunFolder
        from metaoptim.design.report import opened, page
        from metaoptim.report.html.render import render
        from metaoptim.runs.store import write_atomic

    use(data)
    settings = tuple(set_ or ())
    others = [run for run in runs if not isinstance(opened(run, settings), RunFolder)]
    if live and others:
        raise ValueError(f"--live follows runs while they train, and {others[0]} holds none; leave --live out.")
    path = runs[0] / "report.html" if out is None else out
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file, as in --out {path / 'report.html'}.")
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(unfinished: bool) -> None:
        write_atomic(path, render(page([opened(run, settings) for run in runs], unfinished)).encode())

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
