"""Learning curves, from the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from metaoptim.report.html.document import GREY, Axis, Chart, Guide, Number, Series
from metaoptim.report.html.few_shot import scaled

Records = Sequence[Mapping[str, Any]]
POINTS = 300  # of a curve at the most
FEW = 40  # of which each is marked, and none is smoothed
X = TypeVar("X")
STEPS = Axis("outer steps", whole=True)


def charts(runs: Mapping[str, Records], metric: str, best: Mapping[str, Any] | None = None) -> list[Chart]:
    """Loss and validation score against outer steps; of one run, the length of the meta-gradient and the step size too.

    metric: what validation is judged by. best: the best validation of a single run, its step.
    """
    one = next(iter(runs.values())) if len(runs) == 1 else None
    found = [_loss(runs), _validation(runs, metric, best)]
    if one is not None:
        norms = logged(one, "grad_norm", 2)
        found += [_chart("Length of the meta-gradient", "norm", norms), _rates(one)]
    return [chart for chart in found if chart is not None]


def _loss(runs: Mapping[str, Records]) -> Chart | None:
    """The loss of training, as it was logged and smoothed; of several runs, smoothed alone."""
    if len(runs) == 1:
        return _chart("Training loss", "outer loss", logged(next(iter(runs.values())), "loss", 0))
    return _chart(
        "Training loss", "outer loss", [logged(r, "loss", i, name)[-1] for i, (name, r) in enumerate(runs.items()) if r]
    )


def _validation(runs: Mapping[str, Records], metric: str, best: Mapping[str, Any] | None) -> Chart | None:
    """Validation scores; of one run with classes, the accuracy on training tasks too."""
    scale, unit, series = 100 if metric == "accuracy" else 1, "accuracy, %" if metric == "accuracy" else "loss", []
    for i, (name, records) in enumerate(runs.items()):
        points = [(r["step"], scaled(r[f"val_{metric}"], scale)) for r in records if f"val_{metric}" in r]
        steps, values = averaged(points, POINTS)
        told = "validation" if len(runs) == 1 else name
        series += [Series(told, steps, values, colour=i, marked=len(steps) < FEW)] if points else []
    if len(runs) == 1 and series and metric == "accuracy":
        trained = logged(next(iter(runs.values())), metric, GREY, "training tasks", scale)
        series += [replace(one, dashed=True) for one in trained[-1:]]
    guides = (Guide(best["step"], f"best, step {best['step']}"),) if best else ()
    return _chart(f"Validation {unit.partition(',')[0]}", unit, series, guides)


def _rates(records: Records) -> Chart | None:
    """The outer step size, where it changes."""
    rates = [(r["step"], r["lr"]) for r in records if isinstance(r.get("lr"), float | int)]
    steps, values = averaged(rates, POINTS)
    if len(set(values)) < 2:
        return None
    return Chart("Outer step size", STEPS, Axis("step size"), (Series("", steps, values, colour=4),))


def _chart(title: str, label: str, series: Sequence[Series], guides: tuple[Guide, ...] = ()) -> Chart | None:
    return Chart(title, STEPS, Axis(label, log=spans(series)), tuple(series), guides) if series else None


def logged(records: Records, key: str, colour: int, name: str = "", scale: float = 1) -> list[Series]:
    """A value as it was logged, faint, and its running mean; where there are few, these alone; [] where there is none."""
    points = [(r["step"], scaled(r[key], scale)) for r in records if key in r]
    if not points:
        return []
    steps, values = averaged(points, POINTS)
    if len(values) < FEW:
        return [Series(name, steps, values, colour=colour, marked=len(values) < FEW // 2)]
    around = len(values) // FEW + 1
    mean = [_mean(values[max(0, k - around) : k + around + 1]) for k in range(len(values))]
    told = name or f"running mean of {2 * around + 1} points"
    return [Series("as logged", steps, values, colour=colour, faint=True), Series(told, steps, mean, colour=colour)]


def averaged(points: Sequence[tuple[float, Number]], count: int) -> tuple[list[float], list[Number]]:
    """At most so many points: means over stretches of equal length, at their last steps."""
    size = max(1, -(-len(points) // count))
    parts = [points[k : k + size] for k in range(0, len(points), size)]
    return [part[-1][0] for part in parts], [_mean([y for _, y in part]) for part in parts]


def _mean(values: Sequence[Number]) -> Number:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def thinned(items: Sequence[X], count: int) -> list[X]:
    """At most so many items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def spans(series: Sequence[Series]) -> bool:
    """Whether values are better seen on a logarithmic axis: all positive, the largest 20 times the smallest."""
    values = [v for s in series for v in s.y if v is not None]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)
