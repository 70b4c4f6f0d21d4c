"""The command line. What needs torch is imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

from metaoptim.cli.interrupts import quitting

with quitting():
    import shlex
    import sys
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Annotated, Literal

    import typer
    from typer.main import get_command

    import metaoptim
    from metaoptim.cli.adapt import adapt
    from metaoptim.cli.check import check
    from metaoptim.cli.compare import compare
    from metaoptim.cli.diagnose import diagnose
    from metaoptim.cli.errors import told
    from metaoptim.cli.export import export
    from metaoptim.cli.recommend import recommend
    from metaoptim.cli.report import report
    from metaoptim.cli.reproduce import reproduce
    from metaoptim.cli.shared import Data, Device, Settings, console, recipe_of, use
    from metaoptim.cli.tune import tune

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed while running (such as a loss that is not finite, a full disk, or an internal error); "
    "2 wrong input (usage, recipe, data, path, or code of your own that fails); 130 interrupted. METAOPTIM_DEBUG=1 shows the "
    "traceback of an error."
)

# Help is plain without a terminal: if a CI system asks for colours, rich would send it control codes.
app = typer.Typer(
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Design, meta-train and judge meta-optimizers: algorithms that learn how to learn."""
    if version:
        typer.echo(f"metaoptim {metaoptim.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="One kind alone: recipes, algorithms, tasks or models.")
    ] = None,
) -> None:
    """List recipes and their results, algorithms, tasks and models."""
    with quitting():
        from metaoptim.cli.show import overview

    console().print(overview(kind))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An algorithm, recipe, task family or model.")],
) -> None:
    """Explain one of them: equation, paper, deviations, options."""
    with quitting():
        from metaoptim.cli.show import explain

    console().print(explain(name))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (see `metaoptim list`), or a TOML file.")],
    set_: Settings = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="The run's folder; runs/RECIPE if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder, to the same floats.")] = False,
    device: Device = None,
    data: Data = None,
) -> None:
    """Meta-train from a recipe."""
    with quitting():
        from metaoptim import training
        from metaoptim.recipes import recipe as config

    if out is not None and not out:
        raise ValueError("--out is empty; expected the name of a folder.")
    use(data)
    settings = [*(set_ or ()), *([f"train.device={device}"] if device is not None else [])]
    chosen = config.load(recipe, settings)
    folder = Path(out) if out else Path("runs", chosen.name)
    if resume:
        # A run may go on elsewhere, and further where `train` finds that it can.
        config.check_same(chosen, folder, ("train.device", "train.iterations"))
    try:
        chosen.experiment().train(folder, resume=resume)
    except training.TrainingError as error:
        raise typer.TyperException(str(error)) from error
    except KeyboardInterrupt as stop:
        options = [part for setting in set_ or () for part in ("--set", setting)]
        options += ["--device", device] if device is not None else []
        options += ["--data", str(data)] if data else []
        again = shlex.join(["metaoptim", "train", recipe, *options, "--out", str(folder), "--resume"])
        told = getattr(stop, "where", "")  # without the advice, which is for Python
        typer.echo(f"{told}\n{_advice(folder, again)}".strip(), err=True)
        raise
    typer.echo(f"The run is in {folder}.")
    typer.echo(f"To judge it: {shlex.join(['metaoptim', 'evaluate', str(folder)])}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (see `metaoptim list`), or a TOML file.")],
    set_: Settings = None,
    data: Data = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a recipe's meta-step costs in each of the engine's ways.

    Prints seconds and peak memory, and which way training takes. The memory budget is the recipe's engine.budget, in GiB:
    --set engine.budget=2.
    """
    with quitting():
        import json

        from metaoptim.cli import plan as costs
        from metaoptim.recipes import recipe as config

    use(data)
    chosen = config.load(recipe, set_ or ())
    with console(stderr=True).status("measuring") as status:
        found = costs.measure(chosen, status.update)
    if json_:
        typer.echo(json.dumps(costs.document(found), indent=2))
    else:
        console().print(costs.table(found, chosen))


app.command()(check)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are seeds of one recipe.")],
    split: Annotated[str | None, typer.Option(help="The split to judge on.")] = None,
    episodes: Annotated[int | None, typer.Option(help="How many episodes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner steps K at test.")] = None,
    normalisation: Annotated[str | None, typer.Option(help="Whose statistics batch norms use on the query set.")] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="The φ of the best validation score, or the last one.")
    ] = "best",
    set_: Settings = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """Evaluate trained runs on held-out episodes or, learned optimizers, on fresh training problems.

    Options that aren't given come from the recipe. A run that was started from Python may need names for its code, as in --set
    model.name=my.py:Net.
    """
    with quitting():
        from metaoptim.recipes import recipe as config
        from metaoptim.runs.run import warn_unless_finished

    use(data)
    options = {"split": split, "episodes": episodes, "steps": steps, "normalisation": normalisation, "device": device}
    given = {key: value for key, value in options.items() if value is not None}
    stored = [config.load(recipe_of(run), set_ or ()) for run in runs]
    known = [option.name for option in stored[0].kind.options("evaluate", "")]
    if strange := [key for key in given if key not in known]:
        raise ValueError(
            f"--{strange[0]} doesn't apply to a run of {stored[0].tables['algorithm']['name']}; say what does by --set "
            f"evaluate.KEY=VALUE, where KEY is one of {', '.join(known)}."
        )
    recipes = [recipe.replaced({f"evaluate.{key}": value for key, value in given.items()}) for recipe in stored]
    for run, recipe in zip(runs, recipes, strict=True):
        if others := [key for key in recipes[0].differences(recipe) if key not in ("train.seed", "train.device")]:
            raise ValueError(
                f"{runs[0]} and {run} differ in {', '.join(others)}; runs that are judged together must be "
                "seeds of one recipe: evaluate them one by one."
            )
    experiments = [recipe.experiment() for recipe in recipes]
    trained = [one.load(run, checkpoint) for run, one in zip(runs, experiments, strict=True)]
    for found, recipe in zip(trained, recipes, strict=True):
        warn_unless_finished(found, recipe.tables["train"]["iterations"])
    result = experiments[0].evaluate(trained)
    screen = console()
    screen.print(result.table(screen.width))
    picture = runs[0] / "result.png"
    try:
        numbers = result.save(runs[0])
        experiments[0].draw(result, trained, picture)
    except OSError as error:
        raise typer.TyperException(f"the result, printed above, could not be saved: {error}") from error
    typer.echo(f"The numbers are in {numbers}, the picture in {picture}.")
    typer.echo(f"To see all of it on one page: {shlex.join(['metaoptim', 'report', str(runs[0])])}")


app.command()(compare)
app.command()(adapt)
app.command()(reproduce)
app.command()(diagnose)
app.command()(tune)
app.command()(export)
app.command()(recommend)
app.command()(report)


def _advice(folder: Path, again: str) -> str:
    """How to go on with the run in that folder, if there is one."""
    from metaoptim.runs.checkpoint import LAST, PREVIOUS
    from metaoptim.runs.store import RECIPE

    if not (folder / RECIPE).is_file():
        return "Nothing was saved."
    saved = any((folder / name).is_file() for name in (LAST, PREVIOUS))
    return f"To go on: {again}" if saved else f"No step was saved yet. To start again: {again}"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    command = get_command(app)
    return told(lambda given: command(given, prog_name="metaoptim", standalone_mode=False), args)


if __name__ == "__main__":
    sys.exit(main())
