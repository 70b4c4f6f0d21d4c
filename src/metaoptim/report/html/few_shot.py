"""The evaluation of a few-shot run as sections of a page, from its result.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaoptim.core.brief import plural
from metaoptim.evaluation.result import few_tasks
from metaoptim.report.html.document import GREY, Axis, Chart, Note, Number, Part, Score, Section, Series, Table
from metaoptim.report.html.scales import minus

Result = Mapping[str, Any]
LABELS = {"accuracy": "query accuracy, %", "loss": "query loss"}


def sections(result: Result) -> list[Section]:
    """The headline beside the baselines, and the scores after each inner step."""
    told = f"{told_tasks(result['tasks'])}, split {result['split']}, {result['normalisation']} normalisation."
    found = [Section("Result", (score(result), beside(result), *_doubts(result)), told)]
    if result["steps"]:
        metrics = [m for m in ("accuracy", "loss") if m in result["rows"][0]]
        charts = [_per_step(result, metric) for metric in metrics]
        about = "Bands are 95 % intervals over episodes."
        found.append(Section("Score after each inner step", (*charts, _table(result)), about))
    else:
        found.append(Section("Rows", (_table(result),)))
    if len(result["seeds"]) > 1:
        found.append(Section("Training seeds", (_seeds(result),)))
    return found


def told_tasks(tasks: Mapping[str, Any]) -> str:
    """A task family and its options that say something, in words."""
    options = tasks.get("options") or {}
    told = [f"{options['ways']}-way"] if "ways" in options else []
    told += [f"{options['shots']}-shot"] if "shots" in options else []
    return " ".join([str(tasks["family"]), *told])


def score(result: Result) -> Score:
    """The method's score after the last inner step."""
    metric = result["metric"]
    steps = f"after {plural(result['steps'], 'inner step')}, " if result["steps"] else ""
    of = f", the mean of {len(result['seeds'])} training seeds" if len(result["seeds"]) > 1 else ""
    episodes = f"{plural(result['episodes'], 'episode')} of split {result['split']}"
    about = f"{result['rows'][0]['name']}, {steps}on {episodes}{of}; ± is the 95 % interval."
    value, half = written(metric, result["mean"], result["interval"])
    return Score(value, half, "% accuracy" if metric == "accuracy" else "loss", about)


def beside(result: Result) -> Chart:
    """The method and the baselines after the last step, each with its interval."""
    metric, scale = result["metric"], 100 if result["metric"] == "accuracy" else 1
    rows = [row for row in result["rows"] if metric in row]
    means = [scaled(row[metric]["mean"][-1], scale) for row in rows]
    halves = [scaled(row[metric]["interval"][-1], scale) for row in rows]
    return forest("Beside the baselines", [row["name"] for row in rows], means, halves, LABELS[metric])


def forest(title: str, names: Sequence[str], means: Sequence[Number], halves: Sequence[Number], label: str) -> Chart:
    """A line for each name, with its mean and interval; the first one is in colour."""
    ends = [
        (None, None) if mean is None or half is None else (mean - half, mean + half)
        for mean, half in zip(means, halves, strict=True)
    ]
    known = [(mean, i) for i, mean in enumerate(means) if mean is not None]
    series = Series(
        "", [mean for mean, _ in known], [float(i) for _, i in known], [ends[i][0] for _, i in known],
        [ends[i][1] for _, i in known], shape="dots", colours=[GREY if i else 0 for _, i in known],
    )  # fmt: skip
    return Chart(title, Axis(label), Axis("", names=tuple(names)), (series,))


def scaled(value: Number, scale: float) -> Number:
    """A value in another unit."""
    return None if value is None else scale * value


def written(metric: str, value: Number, half: Number = None, signed: bool = False) -> tuple[str, str]:
    """A score and half its interval in words, accuracy in per cent; "" where there is no interval."""
    if value is None:
        return "not finite", ""
    scale, digits = (100, 1) if metric == "accuracy" else (1, _digits(half or value, 2 if half else 3))
    sign = "+" if signed else ""
    return minus(f"{scale * value:{sign}.{digits}f}"), "" if half is None else f"{scale * half:.{digits}f}"


def _digits(value: float, significant: int) -> int:
    """How many stand behind the point of a number with so many significant ones."""
    return min(max(significant - 1 - math.floor(math.log10(abs(value))), 0), 7) if value else significant - 1


def cell(metric: str, value: Number, half: Number = None, signed: bool = False) -> str:
    """The same as one text."""
    return " ± ".join(part for part in written(metric, value, half, signed) if part)


def _per_step(result: Result, metric: str) -> Chart:
    scale, steps = (100 if metric == "accuracy" else 1), list(range(result["steps"] + 1))
    series = []
    for i, row in enumerate(row for row in result["rows"] if metric in row):
        mean, half = row[metric]["mean"], row[metric]["interval"]
        constant = len(mean) == 1
        values = [scaled(mean[0 if constant else k], scale) for k in steps]
        halves = [scaled(half[0 if constant else k], scale) for k in steps]
        low, high = ([None if v is None or h is None else v + sign * h for v, h in zip(values, halves, strict=True)]
                     for sign in (-1, 1))  # fmt: skip
        series.append(Series(row["name"], steps, values, low, high, colour=i, dashed=constant, marked=not constant))
    return Chart(LABELS[metric].capitalize(), Axis("inner steps", whole=True), Axis(LABELS[metric]), tuple(series))


def _table(result: Result) -> Table:
    metric, rows = result["metric"], []
    for row in result["rows"]:
        against = row.get("against_first")
        numbers = row.get(metric, {"mean": [None], "interval": [None]})
        cells = [cell(metric, numbers["mean"][k], numbers["interval"][k]) for k in (0, -1)]
        gap = cell(metric, against["mean"], against["interval"], signed=True) if against else "–"
        rows.append((row["name"], *(cells if result["steps"] else cells[1:]), gap, row["about"]))
    first = ("before any step",) if result["steps"] else ()
    unit = "accuracy in %" if metric == "accuracy" else "loss"
    last = f"after {plural(result['steps'], 'step')}" if result["steps"] else unit
    about = f"{unit.capitalize()} ± 95 % interval; differences are paired, episode by episode, and so surer than two scores."
    return Table(("row", *first, last, "difference", "what it is"), tuple(rows), about=about)


def _seeds(result: Result) -> Table:
    metric, rows = result["metric"], []
    for row in (row for row in result["rows"] if metric in row["seeds"]["means"]):
        means, spread = row["seeds"]["means"][metric], row["seeds"]["spread"][metric]
        rows.append((row["name"], *(cell(metric, x) for x in means), cell(metric, spread)))
    about = "The spread is the standard deviation over training seeds."
    return Table(("row", *(f"seed {s}" for s in result["seeds"]), "spread"), tuple(rows), about=about)


def caveat(sentence: str) -> Note:
    """What intervals don't say, as a note."""
    return Note(f"{sentence[:1].upper()}{sentence[1:]}.")


def _doubts(result: Result) -> list[Part]:
    """What the numbers don't bear out, and what they don't say."""
    few = few_tasks(result["tasks"].get("tasks"))
    found: list[Part] = [caveat(few)] if few else []
    sign = 1 if result["metric"] == "accuracy" else -1
    for row in result["rows"][1:]:
        gap = row.get("against_first") or {}
        mean, half = gap.get("mean"), gap.get("interval")
        if mean is not None and half is not None and sign * mean > -half:
            better = "better than" if sign * mean > half else "as good as"
            text = f"The baseline {row['name']} ({row['about']}) is {better} the method, as far as these episodes can tell."
            found.append(Note(text, "doubt"))
    return found
