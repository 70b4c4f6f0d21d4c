"""The command `check`: the gradient doctor for an algorithm, a recipe, or the user's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Settings, console, use, working

if TYPE_CHECKING:
    from torch import nn

    from metaoptim.core.types import MetaOptimizer
    from metaoptim.tasks import TaskFamily


def check(
    name: Annotated[
        str | None, typer.Argument(metavar="ALGORITHM", help="An algorithm, on a small net and random images.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="A recipe's algorithm, model and tasks.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="A model of your own: a module, or what builds one, in a file here."),
    ] = None,
    loss: Annotated[str | None, typer.Option(metavar="LOSS", help="With --model: cross_entropy or mse.")] = None,
    input: Annotated[str | None, typer.Option(metavar="SHAPE", help="With --model: of one input, as in 1,28,28.")] = None,
    ways: Annotated[int | None, typer.Option(min=2, help="With --model: classes, for a NAME that takes `ways`.")] = None,
    algorithm: Annotated[str | None, typer.Option(metavar="ALGORITHM", help="With --model: maml if not given.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every execution mode, compiled ones too: takes minutes.")] = False,
    set_: Settings = None,
    data: Data = None,
) -> None:
    """Compare meta-gradients with central differences; name the layer at fault.

    The runs of a recipe of a learned optimizer are cut short for it, to about ten steps.

    Exit code 0: correct; 1: a fault was found; 2: wrong input.
    """
    if name is not None and model is not None:
        raise ValueError(f"the algorithm of a model is an option: metaoptim check --model {model} --algorithm {name}.")
    if sum(given is not None for given in (name, recipe, model)) != 1:
        raise ValueError("say what to check: one of ALGORITHM, as in `metaoptim check maml`, --recipe or --model.")
    if recipe is None and set_:
        raise ValueError("--set goes with --recipe alone; leave it out, or name a recipe.")
    only = {"--loss": loss, "--input": input, "--ways": ways, "--algorithm": algorithm}
    if model is None and (stray := [option for option, value in only.items() if value is not None]):
        raise ValueError(f"{stray[0]} goes with --model alone; leave it out, or name a model.")
    use(data)
    with quitting():
        from metaoptim import gradcheck
    if name is not None:
        method, tasks, shape = _named(name)
    elif recipe is not None:
        method, tasks, shape = _recipe(recipe, set_ or ())
    else:
        method, tasks, shape = _own(model or "", loss, input, ways, algorithm)

    with working("checking") as say:
        report = gradcheck.check(method, tasks, input=shape, modes="all" if all_ else "quick", say=say)
    console().print(report.table())
    if not report.ok:
        raise typer.Exit(1)


Subject = tuple["MetaOptimizer", "TaskFamily | None", "tuple[int, ...] | None"]


def _named(name: str) -> Subject:
    """An algorithm on the small network that suits it."""
    import torch

    from metaoptim.algorithms.example import INPUT, example_net
    from metaoptim.core.losses import cross_entropy

    if name.endswith(".toml") or ":" in name:
        option, what = ("--recipe", "a recipe") if name.endswith(".toml") else ("--model", "a model")
        raise ValueError(f"{name} is no algorithm; to check {what}: metaoptim check {option} {name}.")
    build = _known("algorithm", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(example_net(name), cross_entropy), None, INPUT


def _recipe(name: str, settings: Sequence[str]) -> Subject:
    from metaoptim.recipes import recipe as config

    experiment = config.load(name, settings).experiment()
    method, tasks = experiment.checked
    if method.learner.steps != experiment.method.learner.steps:
        typer.echo(f"Its runs are cut short for this, to {method.learner.steps} steps.", err=True)
    return method, tasks, None


def _own(spec: str, loss: str | None, shape: str | None, ways: int | None, algorithm: str | None) -> Subject:
    import torch

    if loss is None or shape is None:
        raise ValueError("--model needs --loss, such as cross_entropy, and --input, the shape of one input, such as 1,28,28.")
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input {shape}: expected whole numbers with commas between them, as in 1,28,28.")
    build, criterion = _known("algorithm", algorithm or "maml"), _known("loss", loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(_module(spec, ways), criterion), None, tuple(map(int, sizes))


def _known(kind: str, name: str) -> Any:
    from metaoptim.algorithms import ALGORITHMS
    from metaoptim.core.brief import nearest
    from metaoptim.core.losses import LOSSES
    from metaoptim.recipes.recipe import builders

    tables: dict[str, Mapping[str, Any]] = {"algorithm": ALGORITHMS, "loss": LOSSES}
    known = tables[kind]
    if kind == "algorithm" and name in builders(kind) and name not in known:
        raise ValueError(f"{name} is checked as a recipe says, with its rule and tasks: metaoptim check --recipe RECIPE.")
    if name not in known:
        raise ValueError(f"unknown {kind} `{name}`{nearest(name, known)}")
    return known[name]


def _module(spec: str, ways: int | None) -> nn.Module:
    """The module that MODULE:NAME is, or builds."""
    from torch import nn

    from metaoptim.recipes import code
    from metaoptim.recipes.schema import REQUIRED, ConfigError

    try:
        known = {option.name: option for option in code.options_of(spec)}
        if ways is not None and "ways" not in known:
            raise ValueError(f"--ways: {spec} takes no argument `ways`; leave it out.")
        given = {} if ways is None else {"ways": ways}
        if missing := [name for name, option in known.items() if option.default is REQUIRED and name not in given]:
            raise ValueError(
                f"--model {spec}: it needs {', '.join(missing)}; name a function that needs nothing (or `ways` alone)."
            )
        found: nn.Module = code.build(spec, given, nn.Module, "a torch.nn.Module")
        return found
    except ConfigError as error:
        raise ValueError(f"--model {error}") from error
