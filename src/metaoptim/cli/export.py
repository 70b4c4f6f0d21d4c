"""The command `export`: a learned optimizer as one file, which `mo.optim.load` takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, recipe_of, use

if TYPE_CHECKING:
    from metaoptim.recipes.recipe import Recipe


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

    It holds the rule, its ψ, the recipe, and the scores of the last evaluation. In Python, mo.optim.load(FILE) makes optimizers
    of it, which train like those of torch.optim.
    """
    with quitting():
        from metaoptim import optim
        from metaoptim.recipes import recipe as config

    use(data)
    recipe = config.load(recipe_of(run), set_ or ())
    trained = recipe.experiment("export").load(run, checkpoint)
    factory = optim.from_run(trained, {"command": command(recipe)})
    file.parent.mkdir(parents=True, exist_ok=True)
    factory.save(file)
    scored = "the scores of its last evaluation" if factory.header["scores"] else "no scores, for it wasn't evaluated yet"
    typer.echo(f"The rule is in {file}, with its recipe and {scored}.")
    typer.echo(f"In Python: optimizer = metaoptim.optim.load({str(file)!r})(model.named_parameters())")


def command(recipe: Recipe) -> str:
    """How such a run is trained again."""
    from metaoptim.recipes import recipe as config

    if recipe.name not in config.names():
        return f"metaoptim train {shlex.quote(f'{recipe.name}.toml')}"
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
