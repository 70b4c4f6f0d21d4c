"""What `metaoptim compare` has found, as a chapter of a page, from comparison.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaoptim.core.brief import plural
from metaoptim.report.html import provenance
from metaoptim.report.html.document import Axis, Chapter, Chart, Guide, Note, Number, Part, Section, Series, Table
from metaoptim.report.html.few_shot import LABELS, caveat, cell, scaled
from metaoptim.report.html.scales import short

FILE = "comparison.json"
Found = Mapping[str, Any]


def chapter(found: Found) -> Chapter:
    """The ranking, differences to the best, learning curves, costs, baselines and provenance."""
    methods, metric = found["methods"], found["metric"]
    budget = found["budget"]
    kind = "each its own" if budget["kind"] is None else f"the same {budget['kind']}, {short(budget['amount'])}"
    facts = (("methods", str(len(methods))), ("metric", metric), ("episodes", str(found["episodes"])), ("budget", kind))
    about = f"From the best to the worst, on the same episodes; intervals are at {100 * found['confidence']:g} %."
    ranking = (_means(found), _differences(found), _ranking(found), *_caveats(found, "seeds", "episodes"))
    sections = [Section("Ranking", ranking, about), *_curves(found), Section("All pairs", (_pairs(found),), PAIRS)]
    sections += [
        Section("Cost", (_costs(found), *_caveats(found, "cost"))),
        Section("Baselines", _baselines(found)),
        _provenance(found),
    ]
    return Chapter(" vs ".join(row["name"] for row in methods), tuple(sections), facts)


PAIRS = (
    "p is that of a sign-flip test over episodes, corrected by Holm for all pairs. A difference over seeds says what another "
    "training would make of it."
)


def _caveats(found: Found, *about: str) -> list[Note]:
    told = found.get("caveats", {})
    return [caveat(told[one]) for one in about if one in told]


def _scale(found: Found) -> float:
    return 100 if found["metric"] == "accuracy" else 1


def _ends(interval: Sequence[Number] | None, scale: float) -> tuple[Number, Number]:
    return (None, None) if interval is None else (scaled(interval[0], scale), scaled(interval[1], scale))


def _told(found: Found, interval: Sequence[Number] | None) -> str:
    return "–" if interval is None else f"{cell(found['metric'], interval[0])} to {cell(found['metric'], interval[1])}"


def _means(found: Found) -> Chart:
    rows, scale = found["methods"], _scale(found)
    names = Axis("", names=tuple(row["name"] for row in rows))
    ends = [_ends(row["over_episodes"], scale) for row in rows]
    dots = _dots([scale * row["mean"] for row in rows], ends, range(len(rows)))
    return Chart("Scores", Axis(LABELS[found["metric"]]), names, (dots,))


def _dots(
    values: Sequence[float], ends: Sequence[tuple[Number, Number]], colours: Sequence[int], notes: Sequence[str] = ()
) -> Series:
    """Values along x, a line for each, in the colours that the methods have in other charts."""
    low, high = [low for low, _ in ends], [high for _, high in ends]
    return Series("", values, list(map(float, range(len(values)))), low, high, "dots", colours=colours, notes=notes)


def against_best(found: Found) -> list[tuple[str, float, Sequence[Number] | None, float]]:
    """For each method but the best: its name, its difference to the best, the interval over episodes, and the corrected p."""
    best, told = found["methods"][0]["name"], []
    for row in found["methods"][1:]:
        pair = next(p for p in found["pairs"] if {p["first"], p["second"]} == {row["name"], best})
        sign = 1 if pair["first"] == row["name"] else -1
        ends = pair["over_episodes"]
        turned = ends if ends is None or sign > 0 else [-ends[1], -ends[0]]
        told.append((row["name"], sign * pair["difference"], turned, pair["corrected"]))
    return told


def _differences(found: Found) -> Part:
    told, scale = against_best(found), _scale(found)
    if not told:
        return Note("There is one method alone, and nothing to compare it with.", "missing")
    ends = [_ends(interval, scale) for *_, interval, _ in told]
    dots = _dots([scale * gap for _, gap, *_ in told], ends, range(1, len(told) + 1), [f"p {p:.4f}" for *_, p in told])
    unit = "accuracy, points" if scale == 100 else "loss"
    names = Axis("", names=tuple(name for name, *_ in told))
    return Chart(f"Difference to {found['methods'][0]['name']}", Axis(f"difference in {unit}"), names, (dots,), (Guide(0, ""),))


def _ranking(found: Found) -> Table:
    metric = found["metric"]
    rows = tuple(
        (
            row["name"], cell(metric, row["mean"]), _told(found, row["over_episodes"]), _told(found, row["over_seeds"]),
            cell(metric, row["iqm"]), f"{row['rank']:.2f}", str(len(row["seeds"])), str(row["steps"]),
        )
        for row in found["methods"]
    )  # fmt: skip
    header = ("method", "mean", "over episodes", "over seeds", "IQM", "mean rank", "seeds", "inner steps at test")
    about = "IQM: the mean of the middle half of the scores. Mean rank: over episodes, 1 is the best."
    return Table(header, rows, about=about)


def _curves(found: Found) -> list[Section]:
    """Validation scores against outer steps and against seconds: means over the seeds, with their range."""
    metric, scale = found["metric"], _scale(found)
    by_steps: list[Series] = []
    by_seconds: list[Series] = []
    for i, row in enumerate(found["methods"]):
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for curve in row["curves"]:
            for point in curve:
                if point.get(metric) is not None:
                    steps.setdefault(point["step"], []).append(point)
        values = [[scale * point[metric] for point in points] for points in steps.values()]
        seconds = [sum(p["seconds"] for p in points) / len(points) for points in steps.values()]
        mean, low, high = [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]
        for places, series in ((list(map(float, steps)), by_steps), (seconds, by_seconds)):
            series += [Series(row["name"], places, mean, low, high, colour=i, marked=True)] if places else []
    if not by_steps:
        return []
    axis = Axis(f"validation {'accuracy, %' if scale == 100 else 'loss'}")
    charts = (Chart("Against outer steps", Axis("outer steps", whole=True), axis, tuple(by_steps)),
              Chart("Against time", Axis("seconds of training"), axis, tuple(by_seconds)))  # fmt: skip
    return [Section("Learning curves", charts, "Means over the seeds; bands are their range.")]


def _pairs(found: Found) -> Table:
    metric = found["metric"]
    rows = tuple(
        (
            p["first"], p["second"], cell(metric, p["difference"], signed=True), _told(found, p["over_episodes"]),
            _told(found, p["over_seeds"]), f"{p['corrected']:.4f}",
        )
        for p in found["pairs"]
    )  # fmt: skip
    return Table(("first", "second", "difference", "over episodes", "over seeds", "p"), rows)


def _costs(found: Found) -> Table:
    rows = []
    for row in found["methods"]:
        cost = row["cost"]
        trained = sum(cost["training_seconds"]) / len(cost["training_seconds"])
        peak = "–" if cost["bytes"] is None else f"{cost['bytes'] / 2**20:.1f}"
        counts = f"{row['iterations']:,}", str(row["tasks_per_step"]), f"{cost['gradients']:,}"
        rows.append((row["name"], *counts, f"{trained:.1f}", f"{1000 * cost['seconds_per_step']:.1f}", peak))
    header = ("method", "outer steps", "tasks", "gradients", "training, s", "a step, ms", "peak, MiB")
    about = "Gradients: evaluations of tasks' losses in one training. Seconds and memory are those of the machine below."
    return Table(header, tuple(rows), about=about)


def _baselines(found: Found) -> tuple[Part, ...]:
    metric = found["metric"]
    rows = [(row["name"], name, cell(metric, *score)) for row in found["methods"] for name, score in row["baselines"].items()]
    return (Table(("method", "baseline", "score"), tuple(rows)),) if rows else (Note("No baselines were measured.", "missing"),)


def _provenance(found: Found) -> Section:
    texts = {f"The recipe of {row['name']}": row["recipe"] for row in found["methods"]}
    about = f"Made on {found['date'][:10]}, {plural(found['resamples'], 'resample')} for each interval. To make it again:"
    return provenance.section(about, [found["command"]], found["environment"], {"episodes": found["episodes_sha256"]}, texts)
