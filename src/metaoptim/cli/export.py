"""The command `export`: a learned optimizer as one file, which `mo.optim.load` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, recipe_of, use


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of a learned optimizer.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file that is written, as in mine.safetensors.")],
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="The ψ of the best validation score, or the last one.")
    ] = "best",
    set_: Settings = None,
    data: Data = None,
) -> None:
    """Write a learned optimizer into one file.

    It holds the rule, its ψ, the recipe, and the scores of its last evaluation. In Python, mo.optim.load(FILE) makes optimizers
    of it, which train like those of torch.optim.
    """
    with quitting():
        from metaoptim import optim
        from metaoptim.recipes import recipe as config
        from metaoptim.recipes.again import command

    use(data)
    recipe = config.load(recipe_of(run), set_ or ())
    trained = recipe.experiment("export").load(run, checkpoint)
    factory = optim.from_run(trained, {"command": command(recipe, f"{recipe.name}.toml")})
    factory.save(file)
    scored = "the scores of its last evaluation" if factory.header["scores"] else "no scores, for this ψ wasn't evaluated yet"
    typer.echo(f"The rule is in {file}, with its recipe and {scored}.")
    typer.echo(f"In Python: optimizer = metaoptim.optim.load({str(file)!r})(model.named_parameters())")
