"""The command `tune`: searches a recipe's keys by cross-validation."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, console, use


def tune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (see `metaoptim list`), or a TOML file.")],
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="TABLE.KEY=SPEC",
            help="What is searched: a range, 1..10 or log:0.01..1, or choices, true|false. Repeatable; inner steps and step "
            "sizes if not given.",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="How many, altogether; 20 if --seconds isn't given either.")] = None,
    seconds: Annotated[float | None, typer.Option(help="After which the search ends.")] = None,
    folds: Annotated[int, typer.Option(help="Of the training classes, or tasks.")] = 3,
    iterations: Annotated[int | None, typer.Option(help="Outer steps of each training; the recipe's own if not given.")] = None,
    pick: Annotated[
        Literal["one-se", "best"],
        typer.Option(help="The fewest inner steps within one standard error of the best score, or the best score."),
    ] = "one-se",
    workers: Annotated[int, typer.Option(help="Processes that try side by side.")] = 1,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database that several machines can work on; else DIR/study.db.")
    ] = None,
    warm_start: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Points that are tried first: a TOML file with tables [[start]].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    set_: Settings = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="The study's folder; tuning/RECIPE if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in that folder.")] = False,
    data: Data = None,
) -> None:
    """Search inner steps, step sizes or any key of a recipe, by cross-validation.

    Each trial trains on all folds of the training split but one and is scored on that one; the splits val and test stay
    untouched. Writes study.json, study.png, and recipe.toml: the recipe to train.
    """
    with quitting():
        from metaoptim.design import study
        from metaoptim.design import tune as search_for
        from metaoptim.recipes import recipe as config

    use(data)
    if out is not None and not out:
        raise ValueError("--out is empty; expected the name of a folder.")
    chosen = config.load(recipe, set_ or ())
    folder = Path(out) if out else Path("tuning", chosen.name)
    options: dict[str, Any] = {
        "--search": search, "--trials": trials, "--seconds": seconds, "--folds": folds if folds != 3 else None,
        "--iterations": iterations, "--pick": pick if pick != "one-se" else None,
        "--workers": workers if workers > 1 else None, "--storage": storage, "--warm-start": warm_start,
        "--seed": seed or None, "--set": set_, "--out": folder, "--data": data,
    }  # fmt: skip
    typed = ["metaoptim", "tune", recipe, *_written(options)]
    try:
        found = search_for(
            chosen, search, trials=trials, seconds=seconds, folds=folds, iterations=iterations, pick=pick, workers=workers,
            storage=storage, warm_start=warm_start or (), seed=seed, out=folder, resume=resume,
            command=shlex.join(_safe(typed)), say=lambda text: typer.echo(text, err=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        if folder.is_dir() and any(folder.iterdir()):
            typer.echo(f"Nothing is lost. To go on: {shlex.join([*typed, '--resume'])}", err=True)
        raise
    console().print(found.table())
    typer.echo(found.said)
    typer.echo(f"The numbers are in {folder / study.JSON}, the picture in {folder / study.PICTURE}.")
    typer.echo(f"To train what was chosen: {shlex.join(['metaoptim', 'train', str(folder / 'recipe.toml')])}")


def _written(options: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    words = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            words += [name, str(one)]
    return words


def _safe(words: list[str]) -> list[str]:
    """What was typed, without the password of a database."""
    from metaoptim.design.storage import hidden

    return [
        hidden(word) if "--storage" in words and words.index("--storage") == i - 1 else word for i, word in enumerate(words)
    ]
