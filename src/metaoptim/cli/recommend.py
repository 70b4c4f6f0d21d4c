"""The command `recommend`: which strategy to try on new tasks, by what was tried on others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, console, use, working

if TYPE_CHECKING:
    from metaoptim.design.trials import Trial


def recommend(
    tasks: Annotated[
        str,
        typer.Argument(
            metavar="TASKS", help="A recipe, by name or TOML file, whose tasks and model are meant, or a task family."
        ),
    ],
    trials: Annotated[
        list[Path] | None,
        typer.Option(
            "--trials",
            metavar="FILE",
            exists=True,
            help="Your own trials: trials.jsonl, ledger.jsonl, or a folder. Repeatable.",
        ),
    ] = None,
    set_: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it goes; recommendations/NAME if not given.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Data = None,
) -> None:
    """Propose a strategy for new tasks, from trials on others.

    Describes the tasks by some episodes, predicts how each strategy that was ever tried would do there, and says how far such
    predictions can be trusted. Writes a recipe to train, and points to start tuning from.
    """
    with quitting():
        import json

        from metaoptim.design.recommend import recommend as find
        from metaoptim.recipes.recipe import file_name

    use(data)
    tried = [trial for path in trials or () for trial in _read(path)]
    folder = out or Path("recommendations", file_name(Path(tasks).name.removesuffix(".toml")))
    with working("recommending") as say:
        found = find(tasks, tried, settings=set_ or (), features=folder, say=say)
    if json_:
        typer.echo(json.dumps(found.document(), indent=2))
    else:
        console().print(found.table())
    try:
        recipe = found.save(folder)
    except OSError as error:
        raise typer.TyperException(f"what is printed above could not be saved: {error}") from error
    if not json_:
        typer.echo(f"To train it: {shlex.join(['metaoptim', 'train', str(recipe)])}")


def _read(path: Path) -> list[Trial]:
    """The trials of a file or a folder, which may be a ledger; ValueError where there are none."""
    from metaoptim.design import trials as stored
    from metaoptim.ledger import records, store
    from metaoptim.recipes import recipe as config

    folder = path if path.is_dir() else path.parent
    found = stored.read(path) if path.is_dir() or path.name != store.FILE else []
    if path.name == store.FILE or (path.is_dir() and (path / store.FILE).is_file()):
        found = [*found, *records.trials(store.read(folder), {name: config.load(name) for name in config.names()})]
    if not found:
        raise ValueError(f"there are no trials in {path}; expected {stored.FILE}, {store.FILE}, or a folder with one of them.")
    return found
