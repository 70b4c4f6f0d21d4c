"""The command `adapt`: a trained run learns from a few files of the user's own, and tells others apart."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Device, Settings, recipe_of

if TYPE_CHECKING:
    from torch import Tensor


def adapt(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run on from_folder or from_table.")],
    support: Annotated[
        Path, typer.Option(metavar="PATH", help="What to learn from: a folder with a folder for each class, or a CSV file.")
    ],
    predict: Annotated[Path, typer.Option(metavar="PATH", help="What to tell: a folder of images, or a CSV file.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The CSV file that is written.")] = Path("predictions.csv"),
    steps: Annotated[int | None, typer.Option(help="Inner steps K; those of the recipe's evaluation if not given.")] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="The φ of the best validation score, or the last one.")
    ] = "best",
    set_: Settings = None,
    device: Device = None,
) -> None:
    """Adapt a run to files of your own, and predict others.

    The run must have been trained on from_folder or from_table; the data that it was trained on aren't needed. Writes a CSV
    file: a line for each image, or the rows of the table, with the prediction, and for classes their probabilities.
    """
    with quitting():
        import torch

        from metaoptim.core import trees
        from metaoptim.evaluation.evaluate import on_device
        from metaoptim.recipes import recipe as config
        from metaoptim.tasks.readers import reader

    for option, given in (("--support", support), ("--predict", predict)):
        if out.resolve() == given.resolve():
            raise ValueError(f"--out {out} is the file of {option}, which would be lost: give --out another name.")
    recipe = config.load(recipe_of(run), set_ or ())
    trained = recipe.experiment("adapt").load(run, checkpoint)
    trained = trained if device is None else on_device(trained, device)
    files = reader(trained.trained["tasks"])
    learnt, classes = files.support(support)
    x, heads, cells = files.queries(predict)
    model = trained.adapt(learnt, recipe.tables["evaluate"]["steps"] if steps is None else steps)
    with torch.no_grad():
        outputs = model(trees.to(x, trained.phi.device))
    predicted = _told(outputs, classes) if classes else [[_short(value)] for value in files.values(outputs).flatten().tolist()]
    lines = [known + told for known, told in zip(cells, predicted, strict=True)]
    _save(out, [[*heads, "prediction", *(f"p({name})" for name in classes)], *lines])
    typer.echo(f"{len(lines)} predictions are in {out}.")


def _told(outputs: Tensor, classes: Sequence[str]) -> list[list[str]]:
    """For each output, the name of the likeliest class, and the probabilities of all."""
    return [[classes[max(range(len(classes)), key=row.__getitem__)], *map(_short, row)] for row in outputs.softmax(-1).tolist()]


def _short(value: float) -> str:
    return f"{value:.6g}"


def _save(file: Path, lines: Sequence[Sequence[str]]) -> None:
    from metaoptim.runs.store import write_atomic

    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.getvalue().encode())
