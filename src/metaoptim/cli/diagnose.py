"""The command `diagnose`: what a run does when it adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Device, Settings, console, recipe_of, use, working

FOLDER = "diagnosis"


def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    split: Annotated[
        str | None, typer.Option(help="The split whose episodes are looked at; the validation split if not given.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="How many episodes are scored.")] = 50,
    closely: Annotated[int, typer.Option(help="How many of them features, gradients and curvature are read from.")] = 10,
    steps: Annotated[
        int | None, typer.Option(help="Inner steps to go to; if not given, twice those of training, at least 10.")
    ] = None,
    normalisation: Annotated[str | None, typer.Option(help="Whose statistics batch norms use on the query set.")] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="The φ of the best validation score, or the last one.")
    ] = "best",
    set_: Settings = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """Look into a run: does it adapt, what does it reuse, are its steps too long?

    Prints a sentence on each; the numbers and a figure of each go to RUN/diagnosis. A run that was started from Python may need
    names for its code, as in --set model.name=my.py:Net.
    """
    with quitting():
        from metaoptim import diagnosis
        from metaoptim.recipes import recipe as config
        from metaoptim.report import draw_diagnosis

    use(data)
    given = {"normalisation": normalisation, "device": device}
    overrides = [*(set_ or ()), *(f"evaluate.{key}={value}" for key, value in given.items() if value is not None)]
    recipe = config.load(recipe_of(run), overrides)
    experiment = recipe.experiment("diagnose")
    tasks = experiment.tasks
    trained = experiment.load(run, checkpoint)
    options = {key: recipe.tables["evaluate"][key] for key in ("normalisation", "seed", "device")}
    with working("diagnosing") as say:
        found = diagnosis.diagnose(
            trained, tasks, split=split, episodes=episodes, closely=closely, steps=steps, **options, say=say,
        )  # fmt: skip
    console().print(found.table())
    folder = run / FOLDER
    try:
        numbers = found.save(folder)
        draw_diagnosis(found, folder)
    except OSError as error:
        raise typer.TyperException(f"the diagnosis, printed above, could not be saved: {error}") from error
    typer.echo(f"The numbers are in {numbers}, a figure of each reading is beside them.")
