"""How many inner steps, and of which size? A search by cross-validation over the classes of a recipe's training split."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from metaoptim.core.brief import brief, plural
from metaoptim.core.checks import check_choice, check_counts, check_flags, check_positive
from metaoptim.design import storage as stored
from metaoptim.design import study
from metaoptim.design.cross_validation import CrossValidation, Setup
from metaoptim.design.space import TEST_STEPS, Choice, Span, grid, space_of, value_of
from metaoptim.design.study import Row, Rule, Tuning
from metaoptim.design.warm_start import Points, points
from metaoptim.design.workers import Job, Worker, several
from metaoptim.recipes import recipe as config
from metaoptim.recipes.places import contents
from metaoptim.recipes.recipe import Recipe
from metaoptim.recipes.schema import ConfigError
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.environment import environment
from metaoptim.runs.progress import tracked
from metaoptim.runs.run import Run
from metaoptim.tasks.base import check_seed

TRIALS = 20
LEAST = 8  # completed trials from which on it is said which keys matter
FEW = 2  # episodes by which it is seen how a recipe is judged


def tune(
    recipe: str | Path | Recipe,
    search: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    settings: Sequence[str] = (),
    trials: int | None = None,
    seconds: float | None = None,
    folds: int = 3,
    iterations: int | None = None,
    pick: Rule = "one-se",
    workers: int = 1,
    storage: str | None = None,
    warm_start: str | Path | Points = (),
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Searches by TPE (Optuna) for the values of a recipe's keys; writes study.json, study.png and recipe.toml, the chosen one.

    A trial trains the recipe once for each fold of its training classes (or tasks, or problems), on the other folds, and scores
    the last φ on the held-out one, on the same episodes in every trial. The splits "val" and "test" are never sampled. A trial
    that is worse than the median of the others at one of its validations is pruned; one that diverges is the worst.

    Args:
        recipe: its name, its file, or itself.
        search: what is searched, {"algorithm.lr": "log:0.01..1", "model.filters": [16, 32]}, or texts KEY=SPEC; inner steps and
            both step sizes where not given. {"evaluate.steps": "1..20"}: the numbers of inner steps at test that may be picked;
            where not given, up to the most of those in training and those in [evaluate].
        settings: options that replace those of the recipe, as in "tasks.ways=10".
        trials: how many, altogether; 20 where neither they nor seconds are given. A space of no more points than that is tried
            whole, each point once.
        seconds: after which no further training step is taken; the trial that is running then is not lost.
        folds: k, 2 or more.
        iterations: outer steps of each training; the recipe's own where not given.
        pick: "one-se" or "best": see `study.pick`.
        workers: processes that try side by side; each has its share of torch's threads.
        storage: the URL of the database that holds the study, such as "postgresql+psycopg2://user@host/database", which several
            machines can work on; a file in `out` where not given.
        warm_start: points that are tried first, by key, or a TOML file of tables [[start]]; the recipe's own values come after.
        seed: of what is drawn; trainings have the recipe's own.
        out: the folder; tuning/RECIPE where not given.
        resume: go on with the study in that folder; with more trials than it has, further ones are drawn.
        command: what was typed, for the record.
        progress: whether to show a progress bar.
        say: is told of each trial, in a line.

    Raises:
        ValueError: what can't be searched or built, or no trial that was completed. KeyboardInterrupt: nothing is lost but the
        outer steps since the last checkpoint of each worker.
    """
    if not isinstance(recipe, str | Path | Recipe):
        raise ValueError(
            f"tune takes a recipe, by its name, its file or itself, for a trial builds one anew; found {brief(recipe)}."
        )
    chosen = config.given(recipe, settings)
    check_counts(trials=trials, workers=workers, iterations=iterations)
    check_counts(2, folds=folds)
    check_positive(seconds=seconds)
    check_flags(resume=resume, progress=progress)
    check_choice(("one-se", "best"), pick=pick)
    check_seed(seed)
    stored.imported()
    space, folder = space_of(chosen, search), Path(out) if out else Path("tuning", chosen.name)
    total = chosen.tables["train"]["iterations"] if iterations is None else iterations
    setup = _judged(Setup(chosen.text(), chosen.name, space, folds, total, seed, files=contents(chosen.tables)))
    first = points(warm_start, space, chosen.name)
    name = f"{chosen.name}-{hashlib.sha256(strict_json(setup.json, sort_keys=True).encode()).hexdigest()[:8]}"
    local = f"sqlite:///{folder / stored.DATABASE}"
    with stored.quiet():
        _check_folder(folder, storage or local, storage is not None, name, setup, resume)
        most = trials if trials is not None else TRIALS if seconds is None else 10**6
        whole = grid(space, most)
        if whole and trials is not None and len(whole) < trials:
            say(f"There are {plural(len(whole), 'point')} to try, and each is tried once.")
        most = len(whole) or most
        deadline = None if seconds is None else time.time() + seconds
        job = Job(storage or local, name, str(folder), most, storage is not None, deadline)
        worker = Worker(job, setup)
        if not worker.study.user_attrs.get("setup"):
            worker.study.set_user_attr("setup", setup.json)
            own = {key: dimension.drawn(value_of(chosen, key)) for key, dimension in space.items() if key != TEST_STEPS}
            first.append({key: value for key, value in own.items() if value is not None})
            for key in (key for key, value in own.items() if value is None):
                here = f"the recipe's {key} = {value_of(chosen, key)} is not in {space[key]}"
                say(f"{here}: {'no trial has its values' if whole else 'the trial of its values draws another'}.")
            # Partial points are completed by drawing, which could repeat one of a space that is tried whole.
            stored.enqueue(worker.study, [point for point in first if point in whole] if whole else first)
        stored.enqueue(worker.study, whole)  # those that are there are passed over
        _run(worker, workers, progress, say)
        rows = stored.rows(worker.study)
        if not rows:
            within = "" if seconds is None else f" within {seconds:g} seconds"
            raise ValueError(f"no trial came to its end{within}; go on with more (resume=True, --resume).")
        taken = study.pick(rows, setup.metric, pick, setup.test_steps)
        shares = stored.importances(worker.study, LEAST)
        facts = _facts(worker, setup, command)
    tuning = Tuning(chosen, setup.metric, {k: str(d) for k, d in space.items()}, tuple(rows), taken, shares, facts)
    tuning.save(folder)
    return tuning


def _judged(setup: Setup) -> Setup:
    """With the metric, and the numbers of test steps that may be picked, as two episodes tell them. Errors: those of trials."""
    judge = CrossValidation(setup)
    short = judge.base.replaced({"train.validate_episodes": FEW})
    experiment, *_ = [judge.experiment(short, fold) for fold in range(setup.folds)]  # all of them: too few classes are told now
    method = experiment.method
    told, searched = experiment.score(Run(method, method.phi)), setup.space.get(TEST_STEPS)
    if len(told.steps) == 1:
        if searched is not None:
            raise ConfigError(f"`{TEST_STEPS}` can't be searched here: such a run is judged at its end alone.")
        return replace(setup, metric=told.metric, test_steps=told.steps)
    train = setup.space.get("algorithm.steps")
    most = max(told.steps[-1], method.learner.steps, *(train.ends if train else ()))
    allowed = range(min(1, most), most + 1) if searched is None else _whole(searched)
    return replace(setup, metric=told.metric, test_steps=tuple(allowed))


def _whole(dimension: Span | Choice) -> Sequence[int]:
    """The numbers of steps of a dimension; ConfigError where they are none."""
    if isinstance(dimension, Span):
        return range(int(dimension.low), int(dimension.high) + 1)
    return sorted(dimension.values)


def _check_folder(folder: Path, url: str, shared: bool, name: str, setup: Setup, resume: bool) -> None:
    """A ValueError where the folder holds a study and it isn't to go on, or another one, or none that could."""
    database, ended = folder / stored.DATABASE, folder / study.JSON
    there = database.is_file() or ended.is_file() or (folder / "trials").is_dir()
    if there and not resume:
        raise ValueError(f"{folder} holds a study already: go on with it (resume=True, --resume), or choose another folder.")
    if resume and not there and not shared:
        raise ValueError(f"there is no study in {folder} to go on with; leave --resume out, or check the path.")
    folder.mkdir(parents=True, exist_ok=True)
    if not shared and there and database.is_file() and (known := stored.names(url)) and name not in known:
        before = Setup.of(stored.setup_in(url, known[0]) or setup.json)
        if before.name != setup.name:
            raise ValueError(f"the study in {folder} is of {before.name}, not {setup.name}; choose another folder.")
        changed = ", ".join(_differences(before, setup)) or "its values"
        raise ValueError(
            f"the study in {folder} was started with other values of {changed}; go on with the same ones, or choose another "
            "folder."
        )


def _differences(before: Setup, now: Setup) -> Iterator[str]:
    """What two setups differ in, as a user would say it."""
    if before.recipe != now.recipe:
        with suppress(ConfigError):
            yield from config.parse(before.recipe, before.name).differences(config.parse(now.recipe, now.name))
    options = {"space": "--search", "folds": "--folds", "iterations": "--iterations", "seed": "--seed",
               "files": "what the files hold that the recipe names"}  # fmt: skip
    yield from (option for field, option in options.items() if before.json[field] != now.json[field])


def _run(worker: Worker, workers: int, progress: bool, say: Callable[[str], None]) -> None:
    """Tries what is left, and tells of each trial."""
    told = {row.number for row in stored.rows(worker.study)}
    left = max(worker.job.trials - len(told), 0) if worker.job.deadline is None else 0
    bar = iter(tracked(range(left), "tuning", progress))
    next(bar, None)

    def look() -> None:
        for row in (row for row in stored.rows(worker.study) if row.number not in told):
            say(_line(row, worker.setup))
            told.add(row.number)
            next(bar, None)

    try:
        if workers > 1:
            several(worker.job, workers, look)
        worker.work(look)  # in this process, and what a worker that was killed has left
    finally:
        cast(Any, bar).close()


def _line(row: Row, setup: Setup) -> str:
    """A trial in a line."""
    drawn = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.params.items()
    )
    if row.state != "complete":
        return f"trial {row.number}: {drawn}: {row.state}{f' ({row.reason})' if row.reason else ''}"
    best = max if setup.metric == "accuracy" else min
    score, error, steps = best(
        (m, e, k) for m, e, k in zip(row.mean, row.error, row.steps, strict=True) if k in setup.test_steps
    )
    after = f" after {plural(steps, 'step')}" if len(row.steps) > 1 else ""
    return f"trial {row.number}: {drawn}: {setup.metric} {score:.4g} ± {error:.2g}{after} ({row.seconds:.0f} s)"


def _facts(worker: Worker, setup: Setup, command: str | None) -> dict[str, Any]:
    results = [t.user_attrs["result"] for t in worker.study.get_trials(deepcopy=False) if "result" in t.user_attrs]
    told: dict[str, Any] = next((result for result in results if "protocol" in result), {})
    return {
        "protocol": told.get("protocol", ""), "folds": setup.folds, "episodes": told.get("episodes"),
        "iterations": setup.iterations, "test_steps": list(setup.test_steps), "seed": setup.seed,
        "standard_error": "s / √n over the episodes of all folds", "storage": stored.hidden(worker.job.url),
        "study": worker.job.name, "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }  # fmt: skip
