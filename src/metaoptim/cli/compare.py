"""The command `compare`: trains recipes within equal budgets, judges them on the same episodes, and tells what differs."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Device, Settings, console, numbers, use


def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|RUN...", help="Names of recipes, TOML files, or folders of runs; two methods or more."),
    ],
    seeds: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="With commas between them, as in 0,1,2; each recipe's own if not given.")
    ] = None,
    budget: Annotated[
        Literal["steps", "gradients", "seconds"] | None,
        typer.Option(help="What is equal for all: outer steps, gradients of tasks' losses, or seconds; else each has its own."),
    ] = None,
    amount: Annotated[
        float | None,
        typer.Option(metavar="N", help="Of the budget, for each training; the least that one recipe takes if not given."),
    ] = None,
    set_: Settings = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where all of it lies; comparisons/NAME-vs-NAME if not given.")
    ] = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """Compare methods: train recipes, judge them on the same episodes, and tell what differs.

    Recipes are trained once for each seed; folders of runs are used as they are, and those that differ in their seed alone are
    one method. Prints means, differences with intervals over episodes and over seeds, corrected p-values and costs, and writes
    comparison.json, scores.safetensors and comparison.png. What was interrupted goes on with the same command.
    """
    with quitting():
        from metaoptim.design.compare import compare as compared
        from metaoptim.training import TrainingError

    if out is not None and not out:
        raise ValueError("--out is empty; expected the name of a folder.")
    use(data)
    options = {"--seeds": seeds, "--budget": budget, "--amount": None if amount is None else f"{amount:g}", "--out": out}
    options |= {"--device": device, "--data": None if data is None else str(data)}
    given = [(key, value) for key, value in options.items() if value is not None] + [("--set", one) for one in set_ or ()]
    again = shlex.join(["metaoptim", "compare", *what, *(part for pair in given for part in pair)])
    try:
        found = compared(
            what, seeds=numbers(seeds), budget=budget, amount=amount, settings=set_ or (), out=out, device=device, command=again
        )
    except TrainingError as error:
        raise typer.TyperException(str(error)) from error
    except KeyboardInterrupt as stop:
        told = getattr(stop, "where", "")
        typer.echo(f"{told}\nTo go on: {again}".strip(), err=True)
        raise
    console().print(found.table())
