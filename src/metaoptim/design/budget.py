"""Equal budgets: how many outer steps each method may take, so that all cost the same in steps, in gradients or in seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from metaoptim.core import trees
from metaoptim.core.brief import plural
from metaoptim.core.checks import check_choice, check_positive
from metaoptim.core.objectives import counts, weights_of
from metaoptim.core.types import MetaOptimizer
from metaoptim.design.contenders import Contender
from metaoptim.engine import Engine, rollout
from metaoptim.engine.timed import TimedStep, side_by_side
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
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic
from metaoptim.training.callbacks import AT_ONCE

Kind = Literal["steps", "gradients", "seconds"]
KINDS: tuple[Kind, ...] = ("steps", "gradients", "seconds")
PACES = "paces.json"
ENOUGH = 3  # timed rounds, for a pace


class Pace(NamedTuple):
    """Seconds of an outer step, with its share of sampling and of validations; and the engine's way, where it was measured."""

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
    """What an outer step takes here, through the engine of the recipe and with its validations; measured, in a few steps."""
    experiment, options, settings = recipe.experiment(), recipe.tables["train"], recipe.tables["engine"]
    method = experiment.method
    engine = Engine(method, **settings, horizon=options["iterations"])
    step = TimedStep(engine, experiment.batch())
    side_by_side([step], ENOUGH)
    began = time.perf_counter()
    experiment.batch()
    sampling = time.perf_counter() - began
    every, validating = options["validate_every"], 0.0
    if every and "val" in experiment.tasks.splits:
        few = min(AT_ONCE, options["validate_episodes"])
        steps = method.learner.steps if options["validate_steps"] is None else options["validate_steps"]
        began = time.perf_counter()
        batch = experiment.tasks.sample("val", seed=options["seed"], start=0, count=few)
        batching = engine.choice.batching if engine.choice else "loop"
        rollout(method, method.phi, trees.to(batch, method.phi.device), {}, steps, batching)
        validating = (time.perf_counter() - began) * options["validate_episodes"] / few / every
    choice = engine.choice.text if engine.choice and engine.choice.by == "measurement" else None
    return Pace(step.seconds + sampling + validating, choice)


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
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = contender.recipe.content_hash
    if key not in known:
        known[key] = pace(contender.recipe)._asdict()
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, f"{strict_json(known, indent=2)}\n".encode())
    return Pace(**known[key])
