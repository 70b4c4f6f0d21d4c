"""Runs recipes again and judges what comes out; what the ledger has already is left alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import metaoptim
from metaoptim.ledger import source
from metaoptim.ledger.cost import cost
from metaoptim.ledger.entry import PROTOCOL, Entry, Key, judged, stated
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Evaluation
from metaoptim.recipes.recipe import Recipe
from metaoptim.runs import metrics
from metaoptim.runs.environment import environment
from metaoptim.runs.store import RECIPE


@dataclass(frozen=True)
class Job:
    """One recipe with one seed that is to be measured."""

    recipe: Recipe
    key: Key

    def __str__(self) -> str:
        return f"{self.recipe.name}, seed {self.key.seed}"

    def folder(self, out: Path) -> Path:
        """Where its run lies, half done or whole."""
        return out / "runs" / f"{config.file_name(self.recipe.name)}-s{self.key.seed}-{self.key.content[:6]}{self.key.code[:6]}"


def jobs(names: Iterable[str], seeds: Sequence[int] | None, device: str | None = None) -> Iterator[Job]:
    """Every recipe with every seed, its own where none are given; ConfigError for a recipe that can't be read."""
    for name in names:
        settings = [f"{table}.device={device}" for table in ("train", "evaluate") if device is not None]
        own = config.load(name, settings)
        code = source.version(own)
        for seed in seeds if seeds is not None else [own.tables["train"]["seed"]]:
            recipe = config.load(name, [*settings, f"train.seed={seed}"])
            for table in ("expected", "published"):
                stated(recipe, table)  # a mistake there is told now, and not after hours
            yield Job(recipe, Key(recipe.content_hash, seed, code))


def missing(wanted: Iterable[Job], entries: Iterable[Entry], any_code: bool = False) -> list[Job]:
    """The jobs that the ledger has no entry of: of this version of the code, or of any."""

    known, found = {same(entry.key, any_code) for entry in entries}, dict[tuple[object, ...], Job]()
    for job in wanted:
        if same(job.key, any_code) not in known:
            found.setdefault(same(job.key, any_code), job)
    return list(found.values())


def same(key: Key, any_code: bool) -> tuple[object, ...]:
    """What two measurements have in common that count as one."""
    return key[:2] if any_code else key


def namesakes(wanted: Iterable[Job], entries: Iterable[Entry]) -> list[str]:
    """A sentence for each job that is the same as one of another name, under which it stands."""
    names, lines = {entry.key: entry.recipe for entry in entries}, []
    for job in wanted:
        if (name := names.setdefault(job.key, job.recipe.name)) != job.recipe.name:
            lines.append(f"{job} is the same as {name}, seed {job.key.seed}, and stands under that name.")
    return lines


def judged_anew(wanted: Iterable[Job], entries: Iterable[Entry], any_code: bool = False) -> list[Entry]:
    """What was measured of recipes that by now state other numbers in [expected] or [published], with the verdict on those.

    any_code: whether the last measurement counts, of whichever version of the code.
    """
    last, found = {same(entry.key, any_code): entry for entry in entries}, []
    for job in wanted:
        expected, published = (stated(job.recipe, table) for table in ("expected", "published"))
        entry = last.get(same(job.key, any_code))
        if entry is not None and (entry.expected, entry.published) != (expected, published):
            value = math.nan if entry.value is None else entry.value
            verdict = judged(entry.metric, value, entry.interval, entry.seed, expected)
            found.append(replace(entry, expected=expected, published=published, verdict=verdict))
    return found


def run(job: Job, out: Path, progress: bool = True) -> tuple[Entry, Evaluation]:
    """Trains (or goes on), evaluates, weighs a meta-step, and judges. Errors: those of `train` and `evaluate`."""
    recipe, folder = job.recipe, job.folder(out)
    experiment = recipe.experiment()
    trained = experiment.train(folder, resume=(folder / RECIPE).is_file(), progress=progress)
    result = experiment.evaluate([trained], progress=progress)
    result.save(folder)
    expected, pace = stated(recipe, "expected"), metrics.pace(folder)
    entry = Entry(
        recipe=recipe.name,
        content=job.key.content,
        seed=job.key.seed,
        code=job.key.code,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=metaoptim.__version__,
        commit=source.commit(),
        algorithm=experiment.method.name,
        metric=result.metric,
        value=result.mean,
        interval=result.interval,
        steps=result.facts["steps"],
        episodes=result.facts["episodes"],
        episodes_sha256=result.facts["episodes_sha256"],
        protocol={"name": result.protocol, "version": PROTOCOL},
        iterations=recipe.tables["train"]["iterations"],
        tasks_per_step=experiment.count,
        steps_per_second=None if pace is None else 1 / pace,
        verdict=judged(result.metric, result.mean, result.interval, job.key.seed, expected),
        rows={name: list(score) for name, score in result.beside.items()},
        cost=cost(trained.method, experiment.batch()),
        expected=expected,
        published=stated(recipe, "published"),
        environment=environment(),
    )
    return entry, result
