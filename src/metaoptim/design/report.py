"""A page about runs, comparisons and searches: gathered from their folders, and from runs where that takes no evaluation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import metaoptim
from metaoptim.core.brief import plural
from metaoptim.design.folder import RunFolder
from metaoptim.design.storage import DATABASE
from metaoptim.diagnosis.step_sizes import by_layer
from metaoptim.evaluation.evaluate import phi_hash
from metaoptim.recipes.again import command
from metaoptim.recipes.recipe import Recipe
from metaoptim.report.html import comparison, diagnosis, provenance, step_sizes, study, training
from metaoptim.report.html.document import Chapter, Note, Page, Part, Section, Table
from metaoptim.report.html.few_shot import LABELS, cell
from metaoptim.runs import Run
from metaoptim.runs.store import METRICS, RECIPE, STATE

REFRESH = 5  # seconds after which a page loads itself again, while a run trains


def page(found: Sequence[RunFolder | Chapter], live: bool = False) -> Page:
    """Everything that is known of these runs, and chapters that are written already.

    live: it is going to be written again, so that the runs themselves are left alone.
    """
    runs = [one for one in found if isinstance(one, RunFolder)]
    chapters = [chapter(one, live) if isinstance(one, RunFolder) else one for one in found]
    title = chapters[0].title
    if len(found) > 1:
        title = f"{title} and {len(found) - 1} more"
    if len(runs) > 1:
        chapters.insert(0, _together(runs))
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    footer = f"Written by metaoptim {metaoptim.__version__} on {now}. This page is one file, and loads nothing from anywhere."
    return Page(title, tuple(chapters), footer, REFRESH if live else 0)


def opened(path: Path, settings: tuple[str, ...] = ()) -> RunFolder | Chapter:
    """A run's folder, or the chapter on the comparison or the search that a folder holds.

    Errors: ValueError, for a folder that holds none of them, or a record that can't be read.
    """
    for name, told in ((comparison.FILE, comparison.chapter), (study.FILE, _studied(path))):
        if (path / name).is_file():
            try:
                return told(json.loads((path / name).read_text(encoding="utf-8")))
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
                raise ValueError(
                    f"{path / name} can't be shown, for it is damaged, or of another version of metaoptim; make it again "
                    "by the command that wrote it."
                ) from error
    if path.is_file():
        raise ValueError(f"{path} is a file; expected the folder of a run, of a comparison or of a search.")
    if (path / DATABASE).is_file():
        raise ValueError(
            f"{path} has a search of which nothing was picked yet: it was interrupted, or no trial was completed; go on with "
            "it (metaoptim tune … --resume)."
        )
    if not (path / RECIPE).is_file():
        raise ValueError(
            f"there is no {path / RECIPE}; expected the folder of a run that `metaoptim train` wrote, of a comparison or of a "
            "search."
        )
    if not any((path / file).is_file() for file in (STATE, METRICS)):
        raise ValueError(f"{path} has a recipe and no training of it; train it: {_train(path)}.")
    return RunFolder(path, settings)


def _train(path: Path) -> str:
    return shlex.join(["metaoptim", "train", str(path / RECIPE)])


def _studied(path: Path) -> Callable[[Mapping[str, Any]], Chapter]:
    return lambda found: study.chapter(found, _train(path))


def chapter(folder: RunFolder, live: bool = False) -> Chapter:
    """All sections on one run."""
    run = None if live else _loaded(folder)
    sections = [*_scored(folder), *_training(folder)]
    sections += [] if live else [*_gallery(folder, run), *_step_sizes(run), *_diagnosis(folder)]
    sections.append(_provenance(folder))
    doubts = tuple(_doubts(folder, run))
    if doubts:
        sections.insert(1 if folder.result else 0, Section("What to know", doubts))
    return Chapter(_title(folder), tuple(sections), tuple(_facts(folder, run)))


def _title(folder: RunFolder) -> str:
    recipe = folder.recipe
    name = recipe.name if isinstance(recipe, Recipe) else folder.name
    return name if folder.name in (name, "") else f"{name} ({folder.name})"


def _loaded(folder: RunFolder) -> Run | str:
    """The run; where it can't be had, a sentence that says why."""
    if isinstance(folder.recipe, str):
        return folder.recipe
    last = folder.facts.get("selection") == "last"
    try:
        return folder.recipe.experiment().load(folder.path, "last" if last else "best")
    except (ValueError, OSError) as error:
        return str(error)


def _facts(folder: RunFolder, run: Run | str | None) -> Iterator[tuple[str, str]]:
    identity, recipe = folder.identity, folder.recipe
    method, tasks = identity.get("method") or {}, identity.get("tasks") or {}
    if "algorithm" in method:
        yield "algorithm", str(method["algorithm"])
    if "family" in tasks:
        yield "tasks", str(tasks["family"])
    yield "training", folder.status
    done = folder.records[-1]["step"] if folder.records else 0
    total = recipe.tables["train"]["iterations"] if isinstance(recipe, Recipe) else None
    yield "outer steps", f"{done:,}" + (f" of {total:,}" if total and total != done else "")
    if best := folder.best:
        score = cell(best["metric"], best["score"])
        yield "best validation", f"{score}{' %' if best['metric'] == 'accuracy' else ''}, step {best['step']:,}"
    if seconds := [r["seconds"] for r in folder.records[1:] if r.get("seconds")]:
        each = median(seconds)
        yield "an outer step", f"{1000 * each:.3g} ms"
        if folder.status == "running" and total:
            yield "time left, about", _time((total - done) * each)
    if isinstance(run, Run):
        yield "numbers in φ", f"{sum(p.numel() for part in run.phi for p in part.values()):,}"
    if "seed" in (identity.get("train") or {}):
        yield "seed", str(identity["train"]["seed"])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _scored(folder: RunFolder) -> list[Section]:
    """What the evaluation says; where there is none, how to have one."""
    result, recipe = folder.result, folder.recipe
    if result is None:
        if not folder.over:
            return []
        there = folder.judged.exists()
        text = "The file result.json can't be read." if there else "This run was not evaluated yet."
        how = shlex.join(["metaoptim", "evaluate", str(folder.path)])
        note = Note(f"{text} How good it is on held-out tasks, beside its baselines, stands here after:", "missing", how)
        return [Section("Result", (note,))]
    if isinstance(recipe, str):
        note = Note(f"The result can't be shown, for the recipe can't be built again: {recipe}", "missing")
        return [Section("Result", (note,))]
    try:
        return list(recipe.experiment().scored(result))
    except (KeyError, TypeError, IndexError, AttributeError):
        text = "The file result.json is not one that this version of metaoptim writes for this recipe; evaluate the run again."
        return [Section("Result", (Note(text, "missing", shlex.join(["metaoptim", "evaluate", str(folder.path)])),))]


def _training(folder: RunFolder) -> list[Section]:
    charts = training.charts({_title(folder): folder.records}, _metric(folder), folder.best)
    if not charts:
        return [Section("Training", (Note("No step of training was logged yet.", "missing"),))]
    lines = plural(len(folder.records), "line")
    return [Section("Training", tuple(charts), f"{lines} of metrics.jsonl, against outer steps.")]


def _metric(folder: RunFolder) -> str:
    known = folder.best.get("metric") or ("accuracy" if any("val_accuracy" in r for r in folder.records) else "loss")
    return str(known)


def _gallery(folder: RunFolder, run: Run | str | None) -> list[Section]:
    """Real episodes, where there are some."""
    try:
        if isinstance(run, Run) and isinstance(folder.recipe, Recipe):
            return list(folder.recipe.experiment().gallery(run, folder.result))
        reason = str(run)
    except (ValueError, OSError) as error:
        reason = str(error)
    return [Section("Episodes", (Note(f"Episodes can't be shown: {reason}", "missing"),))]


def _step_sizes(run: Run | str | None) -> list[Section]:
    if not isinstance(run, Run):
        return []
    rule: Any = getattr(run.method.learner, "rule", None)
    now, before = (by_layer(rule, phi.rule) for phi in (run.phi, run.method.phi))
    if not now:
        return []
    about = "What the update rule has learnt, by the layer whose weights it moves. Below zero, a step climbs the support loss."
    return [Section("Learnt step sizes", tuple(step_sizes.charts(now, before)), about)]


def _diagnosis(folder: RunFolder) -> list[Section]:
    recipe = folder.recipe
    if folder.diagnosis is not None:
        try:
            return [diagnosis.section(folder.diagnosis)]
        except (KeyError, TypeError, IndexError):
            text = "The file diagnosis.json is not one that this version of metaoptim writes; diagnose the run again."
    elif isinstance(recipe, str) or "diagnose" in recipe.kind.refused:
        return []
    else:
        text = "This run was not diagnosed yet. Whether it adapts, and what it reuses, stands here after:"
    how = shlex.join(["metaoptim", "diagnose", str(folder.path)])
    return [Section("Diagnosis", (Note(text, "missing", how),))]


def _doubts(folder: RunFolder, run: Run | str | None) -> Iterator[Part]:
    """What a reader must know before believing the numbers."""
    again = shlex.join(["metaoptim", "train", str(folder.path / RECIPE), "--out", str(folder.path), "--resume"])
    told = folder.status
    if told in ("interrupted", "failed"):
        yield Note(
            f"Training was {told if told == 'interrupted' else 'stopped by an error'} before its end. To go on:", "doubt", again
        )
    elif told == "running":
        yield Note("Training had not ended when this page was written.", "plain")
    if folder.compared:
        yield Note("The result is that of the comparison which has trained this run, over all seeds of its method.")
    for warning in folder.warnings:
        yield Note(f"Training warned: {warning}", "doubt")
    if folder.spoilt:
        yield Note(
            "Lines of metrics.jsonl were damaged, and are missing here: metrics.damaged.jsonl is a copy of all.", "doubt"
        )
    odd = [r["step"] for r in folder.records if any(key in r and r[key] is None for key in ("loss", "val_loss"))]
    if odd:
        yield Note(
            f"A loss was not finite at outer step {odd[0]}" + (f", and at {len(odd) - 1} more." if odd[1:] else "."), "doubt"
        )
    for key, text in (("diverged", "of the training problems diverged"), ("discarded", "of the estimates were discarded")):
        most = max((r[key] for r in folder.records if r.get(key)), default=0)
        if most:
            yield Note(f"Up to {100 * most:.1f} % {text} in an outer step.", "doubt")
    result = folder.result or {}
    judged = [one.get("phi_sha256") for one in folder.facts.get("runs", ())]
    if isinstance(run, Run) and all(judged) and judged and phi_hash(run) not in judged:
        how = shlex.join(["metaoptim", "evaluate", str(folder.path)])
        yield Note("The result is that of other weights than the run has now. To judge these:", "doubt", how)
    if len(result.get("seeds", ())) == 1 and "steps" in result:
        yield Note("One training seed: how much the score changes from one training to the next is not known.")


def _provenance(folder: RunFolder) -> Section:
    facts, recipe = folder.facts, folder.recipe
    tasks = facts.get("tasks") if isinstance(facts.get("tasks"), dict) else {}
    hashes: Mapping[str, Any] = {
        "test episodes": facts.get("episodes_sha256"),
        "test classes": (tasks or {}).get("classes_sha256"),
        **{f"φ that was judged{f' ({i})' if i else ''}": r.get("phi_sha256") for i, r in enumerate(facts.get("runs", ()))},
        **folder.hashes(),
    }
    file = folder.path / RECIPE
    trained = command(recipe, file) if isinstance(recipe, Recipe) else shlex.join(["metaoptim", "train", str(file)])
    commands = [f"{trained} --out RUN", "metaoptim evaluate RUN"]
    texts = {"The recipe, with every option written out": folder.text}
    return provenance.section("The same run again, and its score:", commands, folder.environment, hashes, texts)


def _together(folders: Sequence[RunFolder]) -> Chapter:
    """Runs beside each other: a table, and their learning curves in common axes."""
    names = _distinct([_title(folder) for folder in folders])
    rows = []
    for name, folder in zip(names, folders, strict=True):
        best, result = folder.best, folder.result or {}
        metric = str(result.get("metric", ""))
        score = cell(metric, result["mean"], result["interval"]) if metric else "–"
        validation = cell(best["metric"], best["score"]) if best else "–"
        step = str(folder.records[-1]["step"]) if folder.records else "0"
        rows.append((name, folder.status, step, validation, score, LABELS.get(metric, metric) or "–"))
    header = ("run", "training", "outer steps", "best validation", "score", "what")
    parts: list[Part] = [Table(header, tuple(rows))]
    for metric in dict.fromkeys(map(_metric, folders)):
        alike = {name: folder.records for name, folder in zip(names, folders, strict=True) if _metric(folder) == metric}
        parts += training.charts(alike, metric) if len(alike) > 1 else []
    about = "Scores are as each run was judged; whether a difference is more than chance, `metaoptim compare` tells."
    return Chapter("Together", (Section("All runs", tuple(parts), about),))


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{name} #{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]
