"""Compares methods fairly: trained within equal budgets, judged on the same episodes, with what is uncertain told apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from metaoptim.core.callers import warn
from metaoptim.core.checks import check_flags
from metaoptim.design import budget as budgets
from metaoptim.design import statistics, trials
from metaoptim.design.budget import Kind
from metaoptim.design.comparison import FILE, PICTURE, Comparison, Cost, Row, ranked
from metaoptim.design.contenders import JUDGED, Contender, gather, on_the_same_episodes, placed
from metaoptim.design.judged import Judged, judge, trials_of
from metaoptim.engine import Engine
from metaoptim.engine.timed import TimedStep, side_by_side
from metaoptim.recipes import recipe as config
from metaoptim.recipes.recipe import check_same, file_name
from metaoptim.runs import Run, metrics
from metaoptim.runs.environment import environment
from metaoptim.runs.progress import say
from metaoptim.runs.store import RECIPE
from metaoptim.tasks.base import check_seed
from metaoptim.training.state import TrainingError

NAMED = 3  # methods that a folder is named after


def compare(
    what: Sequence[str | Path | Run],
    *,
    seeds: Sequence[int] | None = None,
    budget: Kind | None = None,
    amount: float | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    device: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Trains recipes with every seed, judges them and runs that are given on the same test episodes, and compares them.

    What is done is kept in `out`: the same call goes on where it was interrupted. There are the runs (`runs/NAME-sSEED`), what
    was judged (`judged/NAME`), comparison.json, scores.safetensors, comparison.png and trials.jsonl. A method whose training
    fails, or whose scores are not finite, is left out with a warning; so the others are compared all the same.

    Args:
        what: names of recipes, TOML files, or runs (their folders), which are used as they are; runs that differ in their
            seed alone are one method.
        seeds: of the trainings; each recipe's own if not given.
        budget: what is made equal by the numbers of outer steps: "steps", "gradients" (evaluations of tasks' losses, see
            `design.budget.gradients`) or "seconds" (of training, estimated from a few steps on this machine); none: each recipe
            keeps its own.
        amount: of the budget, for each training; not given: the least that one of them takes by itself.
        settings: options that replace those of all recipes, as in "algorithm.steps=5"; how runs were trained stays as it was.
        out: the folder; comparisons/NAME-vs-NAME if not given.
        device: where it is computed, such as "cuda"; as the recipes say if not given.
        command: what has asked for it, to be kept with the numbers.
        progress: whether to tell what is done, and how long it still takes.

    Raises:
        ValueError: recipes or runs that can't be read or compared, settings that can't be used. TrainingError: fewer than two
            methods came through. Interrupted: stopped by Ctrl-C while training, after the state was saved.
    """
    statistics.needed()  # what is missing is told now, and not after hours
    budgets.check_budget(budget, amount)
    check_flags(progress=progress)
    for seed in seeds or ():
        check_seed(seed)
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={', '.join(map(str, seeds))}: each counts once; give different ones.")
    if isinstance(what, str | Path):
        raise ValueError(f"compare takes several methods; found {str(what)!r}: give a list of them.")
    placing = [] if device is None else [f"{table}.device={device}" for table in ("train", "evaluate")]
    contenders = on_the_same_episodes(gather(what, seeds, [*settings, *placing]))
    folder = Path(out) if out is not None else default_folder([one.name for one in contenders])
    contenders, total = budgets.equalised(contenders, budget, amount, folder)
    contenders = placed(contenders, folder)
    gradients = {one.name: one.iterations * budgets.per_step(one.experiment) for one in contenders}  # all methods are built now
    for one in (c for c in contenders if not c.given):
        for recipe, place in zip(one.recipes, one.folders, strict=True):
            check_same(recipe, place, ("train.device", "train.iterations"))
            budgets.check_started(recipe, place)
    left_out = _trained(contenders, progress)
    judged: dict[str, Judged] = {}
    for one in (c for c in contenders if c.name not in left_out):
        say(f"judging {one.name}", progress)
        found = judge(one, one.runs or one.load(), folder / JUDGED, progress)
        _keep(folder, one, found)
        if found.fault is None:
            judged[one.name] = found
        else:
            left_out[one.name] = found.fault
    for name, fault in left_out.items():
        warn(f"{name} is left out of the comparison: {fault}")
    kept = [one for one in contenders if one.name in judged]
    _check_alike(kept, judged)
    facts = {
        "budget": {"kind": budget, "amount": total},
        **{key: getattr(judged[kept[0].name], key) for key in ("episodes", "episodes_sha256", "tasks")},
        "protocols": {name: found.protocol for name, found in judged.items()},
        "left_out": left_out,
        "confidence": statistics.CONFIDENCE, "resamples": statistics.RESAMPLES,
        "environment": environment(), "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    say("weighing a meta-step of each", progress)
    comparison = ranked(judged[kept[0].name].metric, _rows(kept, judged, gradients), facts)
    comparison.save(folder)
    comparison.draw(folder / PICTURE)
    say(f"The numbers are in {folder / FILE}, the picture in {folder / PICTURE}.", progress)
    return comparison


def default_folder(names: Sequence[str]) -> Path:
    """Where methods of these names are compared."""
    more = f"-and-{len(names) - NAMED}-more" if len(names) > NAMED else ""
    return Path("comparisons", "-vs-".join(map(file_name, names[:NAMED])) + more)


def _trained(contenders: Sequence[Contender], progress: bool) -> dict[str, str]:
    """Trains what isn't trained yet, seed by seed, so that all methods come as far; what fails, by method, in words."""
    jobs = [
        (one, i)
        for i in range(max(len(one.recipes) for one in contenders))
        for one in contenders
        if not one.given and i < len(one.recipes)
    ]
    failed: dict[str, str] = {}
    taken: dict[str, list[float]] = {}
    for number, (one, i) in enumerate(jobs, 1):
        if one.name in failed:
            continue
        left = _left([c.name for c, _ in jobs[number - 1 :]], taken)
        say(f"{number} of {len(jobs)}: {one.name}, seed {one.seeds[i]}{left}", progress)
        place, began = one.folders[i], time.monotonic()
        there = (place / RECIPE).is_file()
        try:
            one.recipes[i].experiment().train(place, resume=there, progress=progress)
        except TrainingError as error:
            failed[one.name] = f"seed {one.seeds[i]} failed: {error}"
        if not there:
            taken.setdefault(one.name, []).append(time.monotonic() - began)
    return failed


def _left(names: Sequence[str], taken: Mapping[str, Sequence[float]]) -> str:
    """About how long so many trainings take, from those that were seen: of the same method, or else of all."""
    if not taken:
        return ""
    every = [x for seen in taken.values() for x in seen]
    seconds = sum(sum(seen) / len(seen) for seen in (taken.get(name, every) for name in names))
    return f"; about {timedelta(seconds=round(seconds))} of training left"


def _keep(folder: Path, contender: Contender, judged: Judged) -> None:
    """Appends a trial for each seed, unless it is there."""
    known = [_timeless(trial) for trial in trials.read(folder)]
    for trial in trials_of(contender, judged):
        if _timeless(trial) not in known:
            trials.append(folder, trial)


def _timeless(trial: trials.Trial) -> trials.Trial:
    return replace(trial, date="", version="", seconds=None)


def _check_alike(contenders: Sequence[Contender], judged: Mapping[str, Judged]) -> None:
    """Raises where fewer than two are left, or where two were judged by different measures after all."""
    if len(contenders) < 2:
        raise TrainingError("fewer than two methods came through, so that there is nothing to compare; see the warnings.")
    first = judged[contenders[0].name]
    for one in contenders[1:]:
        own = judged[one.name]
        for what in ("metric", "episodes", "episodes_sha256"):
            if getattr(own, what) != getattr(first, what):
                raise ValueError(
                    f"{contenders[0].name} and {one.name} differ in {what} ({getattr(first, what)} and {getattr(own, what)}), "
                    "so that their scores can't be compared; give methods for the same tasks."
                )


def _rows(contenders: Sequence[Contender], judged: Mapping[str, Judged], gradients: Mapping[str, int]) -> list[Row]:
    scores = {one.name: judged[one.name].scores for one in contenders}
    metric = judged[contenders[0].name].metric
    ranks = statistics.mean_ranks(scores, metric == "accuracy")
    steps = [_step(one) for one in contenders]
    side_by_side(steps)
    rows = []
    for one, step in zip(contenders, steps, strict=True):
        own, experiment = judged[one.name], one.experiment
        x = own.scores
        cost = Cost(
            step.seconds, step.most, step.way, tuple(metrics.elapsed(place) for place in one.folders),
            gradients[one.name],
        )  # fmt: skip
        row = Row(
            one.name, one.recipe.text(), one.seeds, tuple(map(str, one.folders)), one.iterations, experiment.count, own.steps,
            x, float(x.mean()), statistics.over_episodes(x), statistics.over_seeds(x), statistics.iqm(x),
            statistics.iqm_over_seeds(x), ranks[one.name], cost, own.baselines,
            tuple(metrics.validations(place) for place in one.folders),
        )  # fmt: skip
        rows.append(row)
    return rows


def _step(contender: Contender) -> TimedStep:
    """A meta-step in the way in which the first run was trained: the one that was measured then, or else by rule."""
    recipe, experiment = contender.recipe, contender.experiment
    stored = recipe if contender.given else config.load(contender.folders[0] / RECIPE)
    settings: dict[str, Any] = stored.tables["engine"] | budgets.by_name(stored.tables["engine"]["choice"])
    return TimedStep(Engine(experiment.method, **settings, wait=1), experiment.batch())
