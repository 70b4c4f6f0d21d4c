"""What `metaoptim tune` has found, as a chapter of a page, from study.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metaoptim.report.html import provenance
from metaoptim.report.html.document import (
    GREY,
    Axis,
    Chapter,
    Chart,
    HeatMap,
    Note,
    Number,
    Part,
    Score,
    Section,
    Series,
    Table,
)
from metaoptim.report.html.few_shot import LABELS, cell, scaled, written
from metaoptim.report.html.scales import short

FILE = "study.json"
Found = Mapping[str, Any]
Trial = Mapping[str, Any]
Place = Callable[[Found, Trial], int]
COLUMNS = 12  # numbers of inner steps at test in a heat map


def chapter(found: Found, trained: str) -> Chapter:
    """The pick, the trials, what mattered, and provenance. trained: the command that trains the pick."""
    trials, metric = found["trials"], found["metric"]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    picked = found["picked"]
    unit = "% accuracy" if metric == "accuracy" else "loss"
    at = f"trial {picked['trial']} after {picked['test_steps']} inner steps; ± is one standard error."
    score = Score(*written(metric, picked["score"], picked["error"]), unit, at)
    how = Note("To train it on the whole training split:", "plain", trained)
    pick = (score, _by_steps(found, complete), Note(picked["why"]), how)
    sections = [Section("Pick", pick, f"{found['protocol']}."), Section("Trials", _trials(found, complete))]
    sections.append(Section("What mattered", (_importances(found), *_keys(found, complete))))
    about = f"Made on {found['date'][:10]}. To make it again:"
    texts = {"The chosen recipe": found["chosen"], "The recipe that was searched from": found["recipe"]}
    sections.append(provenance.section(about, [found["command"]], found["environment"], {}, texts))
    facts = (("trials", f"{len(trials)}, {len(complete)} complete"), ("folds", str(found["folds"])), ("metric", metric),
             ("episodes", str(found["episodes"])), ("outer steps of a trial", f"{found['iterations']:,}"))  # fmt: skip
    return Chapter(f"A search: {found['study'].rpartition('-')[0] or found['study']}", tuple(sections), facts)


def _scale(found: Found) -> float:
    return 100 if found["metric"] == "accuracy" else 1


def _best(found: Found, trial: Trial) -> int:
    """At which of its numbers of inner steps at test a trial is best, of those that may be picked."""
    allowed = [i for i, k in enumerate(trial["steps"]) if k in found["test_steps"]] or list(range(len(trial["steps"])))
    sign = 1 if found["metric"] == "accuracy" else -1
    return max(allowed, key=lambda i: sign * trial["mean"][i])


def _picked(found: Found, trial: Trial) -> int:
    return list(trial["steps"]).index(found["picked"]["test_steps"])


def _points(
    found: Found, trials: Sequence[Trial], x: Mapping[int, float], place: Place, name: str, colour: int
) -> list[Series]:
    """A dot for each trial, at its x, with one standard error."""
    scale, shown = _scale(found), sorted((t for t in trials if t["number"] in x), key=lambda t: x[t["number"]])
    if not shown:
        return []
    places = [place(found, t) for t in shown]
    values = [scale * t["mean"][i] for t, i in zip(shown, places, strict=True)]
    errors = [scale * t["error"][i] for t, i in zip(shown, places, strict=True)]
    low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
    notes = [f"trial {t['number']}, {t['steps'][i]} inner steps at test" for t, i in zip(shown, places, strict=True)]
    return [Series(name, [x[t["number"]] for t in shown], values, low, high, "dots", colour, notes=notes)]


def _dots(found: Found, complete: Sequence[Trial], x: Mapping[int, float], title: str, axis: Axis) -> Chart:
    own = [t for t in complete if t["number"] == found["picked"]["trial"]]
    series = _points(found, complete, x, _best, "trials at their best", GREY) + _points(found, own, x, _picked, "picked", 0)
    return Chart(title, axis, Axis(LABELS[found["metric"]]), tuple(series))


def _by_steps(found: Found, complete: Sequence[Trial]) -> Chart:
    x = {t["number"]: float(t["train_steps"]) for t in complete}
    return _dots(found, complete, x, "Score against inner steps in training", Axis("inner steps in training", whole=True))


def _trials(found: Found, complete: Sequence[Trial]) -> tuple[Part, ...]:
    scale, picked = _scale(found), found["picked"]["trial"]
    lines = []
    for t in complete:
        own, values = t["number"] == picked, [scaled(v, scale) for v in t["mean"]]
        lines.append(Series("picked" if own else "", t["steps"], values, colour=0 if own else GREY, faint=not own))
    axes = Axis("inner steps at test", whole=True), Axis(LABELS[found["metric"]])
    about = "The picked trial in colour, the others in grey."
    chart = Chart("Score after each inner step at test", *axes, tuple(lines), about=about)
    return (*([chart] if complete else []), *_map(found, complete), _table(found))


def _map(found: Found, complete: Sequence[Trial]) -> list[HeatMap]:
    """Inner steps in training × at test: the best score of any trial."""
    best = max if found["metric"] == "accuracy" else min
    rows = sorted({t["train_steps"] for t in complete})
    columns = sorted({k for t in complete for k in t["steps"]} & {*found["test_steps"]})
    if len(rows) < 2 or len(columns) < 2 or len(columns) > COLUMNS:
        return []

    def value(train: int, test: int) -> Number:
        known = [t["mean"][list(t["steps"]).index(test)] for t in complete if t["train_steps"] == train and test in t["steps"]]
        return scaled(best(known), _scale(found)) if known else None

    values = tuple(tuple(value(r, c) for c in columns) for r in rows)
    every = [v for row in values for v in row if v is not None]
    x, y = Axis("inner steps at test", names=tuple(map(str, columns))), Axis("", names=tuple(f"{r} in training" for r in rows))
    taken = next(t for t in complete if t["number"] == found["picked"]["trial"])
    picked = columns.index(found["picked"]["test_steps"]), rows.index(taken["train_steps"])
    about = "The best trial of each; the star is at what was picked."
    title, label = "Steps in training, steps at test", LABELS[found["metric"]]
    return [HeatMap(title, x, y, values, min(every), max(every), label, about, picked)]


def _table(found: Found) -> Table:
    rows = []
    for t in found["trials"]:
        params = [_shown(t["params"].get(key)) for key in found["space"]]
        end = f"{t['seconds']:.0f}", f"{t['state']} {t['reason']}".strip()
        if t["state"] != "complete":
            rows.append((str(t["number"]), *params, "–", "–", *end))
            continue
        picked = _picked(found, t) if t["number"] == found["picked"]["trial"] else None
        for at in dict.fromkeys((_best(found, t), _best(found, t) if picked is None else picked)):
            score = str(t["steps"][at]), cell(found["metric"], t["mean"][at], t["error"][at])
            rows.append((f"{'*' if at == picked else ''}{t['number']}", *params, *score, *end))
    header = ("trial", *found["space"], "after inner steps at test", "score", "seconds", "state")
    about = "Each score is the trial's best, after so many inner steps at test; * is what was picked. ± is one standard error."
    return Table(header, tuple(rows), about=about)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return short(value, 3)


def _importances(found: Found) -> Part:
    if not found["importances"]:
        return Note("Too few trials were completed to say which keys matter.", "missing")
    shares = sorted(found["importances"].items(), key=lambda item: -item[1])
    names = Axis("", names=tuple(key for key, _ in shares))
    dots = Series("", [100 * share for _, share in shares], list(range(len(shares))), shape="dots")
    return Chart("What makes a trial one of the best", Axis("share, %"), names, (dots,), bounds=(0.0, 100.0))


def _keys(found: Found, complete: Sequence[Trial]) -> list[Chart]:
    """For each key with numbers: the score against its value."""
    charts = []
    for key, spec in found["space"].items():
        x = {t["number"]: t["params"][key] for t in complete if isinstance(t["params"].get(key), int | float)}
        if len(set(x.values())) > 1 and not any(isinstance(v, bool) for v in x.values()):
            axis = Axis(key, log=str(spec).startswith("log:"), whole=all(isinstance(v, int) for v in x.values()))
            charts.append(_dots(found, complete, x, key, axis))
    return charts
