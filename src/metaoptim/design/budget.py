"""Equal budgets: how many outer steps each method may take, so that all cost the same in steps, in gradients or in seconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from metaoptim.core import trees
from metaoptim.core.brief import plural
from metaoptim.core.checks import check_choice, check_positive
from metaoptim.core.objectives import counts, weights_of
from metaoptim.core.types import MetaOptimizer
from metaoptim.design.contenders import Contender
from metaoptim.engine import Engine
from metaoptim.estimators import (
    Displacement,
    EvolutionStrategy,
    FiniteDifferences,
    Joint,
    Truncated,
    Unroll,
    WarpObjective,
    unguarded,
)
from metaoptim.recipes.experiment import Experiment
from metaoptim.recipes.recipe import Recipe, load
from metaoptim.runs import metrics
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import RECIPE, write_atomic
from metaoptim.training import Interrupted

Kind = Literal["steps", "gradients", "seconds"]
KINDS: tuple[Kind, ...] = ("steps", "gradients", "seconds")
PACES = "paces.json"
WARM, TIMED = 3, 7  # outer steps, for a pace


class Pace(NamedTuple):
    """Seconds of an outer step, with its share of validations; and the engine's way, where it was measured."""

    seconds: float
    choice: str | None


def gradients(method: MetaOptimizer) -> int:
    """Evaluations of one task's loss, with a gradient or in place of one, in an outer step: inner steps plus judged states.

    An estimator that goes through a run window by window takes one window's; an evolution strategy both runs of every pair, and
    finite differences two runs for each learnt number. Second derivatives, and the products with a Hessian of an implicit
    gradient, come on top and are not counted; training without tasks takes one.
    """
    learner, estimator = method.learner, unguarded(method.estimator)
    steps, runs, judged = learner.steps // estimator.lasts(learner), 1, 1
    match estimator:
        case Joint():
            steps = 0
        case Unroll():
            judged = sum(counts(weight) for weight in weights_of(estimator.objective, steps, torch.tensor(0)))
        case Displacement():
            judged = 0
        case Truncated() | WarpObjective():
            judged = steps
        case EvolutionStrategy():
            judged, runs = steps, 2 * estimator.pairs
        case FiniteDifferences():
            runs = 2 * sum(x.numel() for x in trees.flatten(method.split(method.phi)[0]))
    return runs * (steps + judged)


def per_step(experiment: Experiment) -> int:
    """Evaluations of tasks' losses in an outer step of all its tasks, T times those of one."""
    return experiment.count * gradients(experiment.method)


def pace(recipe: Recipe) -> Pace:
    """What an outer step takes here, in training as the recipe says, with its share of validations; measured in a few steps.

    Where the engine measures which way is the fastest, it does so now, for as many steps as the recipe has.
    """
    experiment, options, settings = recipe.experiment(), recipe.tables["train"], dict(recipe.tables["engine"])
    method, choice = experiment.method, settings["choice"]
    if settings["runtime"] == "auto" and choice is None:
        engine, batch = Engine(method, **settings, horizon=options["iterations"]), experiment.batch()
        choice = engine.plan(method.phi, batch, engine.init(method.phi, batch)).choice.text
    few = {"iterations": WARM + TIMED, "log_every": 1, "early_stopping": None, "check": False}
    tables = {"train": options | few, "engine": settings | by_name(choice)}
    with TemporaryDirectory() as folder:
        try:
            replace(recipe, tables=recipe.tables | tables).experiment().train(folder, progress=False)
        except Interrupted:  # whose folder is nobody's
            raise Interrupted(f"stopped while measuring how long an outer step of {recipe.name} takes") from None
        lines = metrics.read(Path(folder))
    step = statistics.median(line["seconds"] for line in lines[WARM:])
    validation = lines[-1]["elapsed"] - lines[-2]["elapsed"] - lines[-1]["seconds"]  # which is after the last step
    every = options["validate_every"]
    return Pace(step + (max(0.0, validation) / every if every else 0.0), choice)


def by_name(choice: str | None) -> dict[str, str | None]:
    """The engine's settings that name a way which was measured, as `Choice.text` writes it; {} for none.

    One that is named is taken at once, and isn't held to the plain loop now and then: it can be timed.
    """
    names = ("batching", "memory", "runtime")
    return {} if choice is None else {"choice": None, **dict(zip(names, choice.split(), strict=True))}


def check_budget(kind: Any, amount: Any) -> None:
    """A ValueError for what can't be a budget."""
    if kind is None:
        if amount is not None:
            raise ValueError(f"amount={amount} of what? Give a budget too: {', '.join(KINDS)}.")
        return
    check_choice(KINDS, budget=kind)
    check_positive(amount=amount)
    if amount is not None and kind != "seconds" and amount != int(amount):
        raise ValueError(f"amount={amount}: a budget of {kind} is a whole number.")


def equalised(
    contenders: Sequence[Contender], kind: Kind | None, amount: float | None, out: Path
) -> tuple[list[Contender], float | None]:
    """The contenders with as many outer steps as the budget allows each, and what it comes to (None: there is none).

    amount: of the budget; the least that one of them would take by itself where it is not given. What is measured for a budget
    of seconds is kept in `out`, so that the same command goes on with the same numbers of steps.

    Errors: ValueError where a run that is there already had another budget.
    """
    if kind is None:
        return list(contenders), None
    if kind == "seconds" and (there := [one.name for one in contenders if one.given]):
        raise ValueError(
            f"--budget seconds: {there[0]} is trained already, for as long as it took; give recipes alone, or another budget."
        )
    each, choices = _units(contenders, kind, out)
    total = min(one.iterations * x for one, x in zip(contenders, each, strict=True)) if amount is None else float(amount)
    found = []
    for one, x, choice in zip(contenders, each, choices, strict=True):
        iterations = max(1, round(total / x))
        if one.given and iterations != one.iterations:
            raise ValueError(
                f"--budget {kind}: {one.name} is trained already, for {plural(one.iterations, 'outer step')}, and {total:g} "
                f"{kind} would be {iterations}; give an --amount of {one.iterations * x:g}, or its recipe in place of the run."
            )
        changed = one.changed("train", {"iterations": iterations})
        found.append(changed if choice is None else changed.changed("engine", {"choice": choice}))
    return found, total


def check_started(recipe: Recipe, folder: Path) -> None:
    """Raises a ValueError where a folder's run was started for another number of outer steps."""
    stored = folder / RECIPE
    now = recipe.tables["train"]["iterations"]
    there = load(stored).tables["train"]["iterations"] if stored.is_file() else now
    if there != now:
        raise ValueError(
            f"the run in {folder} was started for {plural(there, 'outer step')}, and would have {now} now; give the same "
            "--budget, --amount and train.iterations to go on with it, or another folder (--out)."
        )


def _units(contenders: Sequence[Contender], kind: Kind, out: Path) -> tuple[list[float], list[str | None]]:
    """What an outer step of each costs, and the engine's way where it was measured for that."""
    if kind == "seconds":
        paces = [_kept(one, out) for one in contenders]
        return [own.seconds for own in paces], [own.choice for own in paces]
    each = [float(per_step(one.experiment)) if kind == "gradients" else 1.0 for one in contenders]
    return each, [None] * len(contenders)


def _kept(contender: Contender, out: Path) -> Pace:
    """The pace that was measured for this recipe when the comparison began, or now."""
    file = out / PACES
    known = _paces(file) if file.is_file() else {}
    key = contender.recipe.content_hash
    if key not in known:
        known[key] = pace(contender.recipe)
        out.mkdir(parents=True, exist_ok=True)
        told = {one: each._asdict() for one, each in known.items()}
        write_atomic(file, f"{strict_json(told, indent=2)}\n".encode())
    return known[key]


def _paces(file: Path) -> dict[str, Pace]:
    """Those of a file that an earlier command wrote. ValueError for another one."""
    try:
        return {key: Pace(**own) for key, own in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged; remove it, and how long outer steps take is measured again.") from error
