"""Learning curves, from the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from metaoptim.report.html.document import GREY, Axis, Chart, Guide, Number, Series
from metaoptim.report.html.few_shot import scaled

Records = Sequence[Mapping[str, Any]]
POINTS = 300  # of a curve at the most
X = TypeVar("X")
STEPS = Axis("outer steps", whole=True)


def charts(runs: Mapping[str, Records], metric: str, best: Mapping[str, Any] | None = None) -> list[Chart]:
    """Loss and validation score against outer steps; of one run, the length of the meta-gradient and the step size too.

    metric: what validation is judged by. best: the best validation of a single run, its step.
    """
    one = len(runs) == 1
    loss = [s for i, (name, records) in enumerate(runs.items()) for s in _smooth(records, "loss", name, i, one)]
    found = [Chart("Training loss", STEPS, Axis("outer loss", log=spans(loss)), tuple(loss))] if loss else []
    scale, unit = (100, "accuracy, %") if metric == "accuracy" else (1, "loss")
    judged = [_validation(records, metric, scale, name, i, one) for i, (name, records) in enumerate(runs.items())]
    judged = [series for series in judged if series.x]
    if judged:
        beside = _smooth(next(iter(runs.values())), metric, "", 1, True, scale)[1:] if one and metric == "accuracy" else []
        series = (*judged, *(_named(s, "training tasks", GREY) for s in beside))
        guides = (Guide(best["step"], f"best, step {best['step']}"),) if best else ()
        axis = Axis(f"validation {unit}" if not beside else unit, log=spans(series))
        found.append(Chart(f"Validation {unit.partition(',')[0]}", STEPS, axis, series, guides))
    if one and found:
        norms = _smooth(next(iter(runs.values())), "grad_norm", "", 2, True)
        if norms:
            found.append(Chart("Length of the meta-gradient", STEPS, Axis("norm", log=spans(norms)), tuple(norms)))
        found += _rates(next(iter(runs.values())))
    return found


def _rates(records: Records) -> list[Chart]:
    """The outer step size, where it changes."""
    rates = [(r["step"], r["lr"]) for r in records if isinstance(r.get("lr"), float | int)]
    if len({lr for _, lr in rates}) < 2:
        return []
    shown = thinned(rates, POINTS)
    series = Series("", [step for step, _ in shown], [lr for _, lr in shown], colour=4)
    return [Chart("Outer step size", STEPS, Axis("step size"), (series,))]


def _named(series: Series, name: str, colour: int) -> Series:
    return Series(name, series.x, series.y, colour=colour, dashed=True)


def _validation(records: Records, metric: str, scale: float, name: str, i: int, one: bool) -> Series:
    points = [(r["step"], scaled(r[f"val_{metric}"], scale)) for r in records if f"val_{metric}" in r]
    shown = thinned(points, POINTS)
    return Series("validation" if one else name, [x for x, _ in shown], [y for _, y in shown], colour=i, marked=len(shown) < 40)


def _smooth(records: Records, key: str, name: str, i: int, raw: bool, scale: float = 1) -> list[Series]:
    """A value as it was logged, faint, and its running mean."""
    points = [(r["step"], scaled(r[key], scale)) for r in records if key in r]
    if not points:
        return []
    steps, values = averaged(points, POINTS)
    window = max(1, len(values) // 20)
    mean = [_mean(values[max(0, k - window) : k + window + 1]) for k in range(len(values))]
    told = Series(f"running mean of {2 * window + 1} points" if raw and not name else name, steps, mean, colour=i)
    logged = Series("as logged" if raw else "", steps, values, colour=i, faint=True)
    if window < 2:  # too few to smooth
        return [Series(name, steps, values, colour=i)]
    return [logged, told] if raw else [told]


def averaged(points: Sequence[tuple[float, Number]], count: int) -> tuple[list[float], list[Number]]:
    """At most so many points: means over stretches of equal length, at their last steps."""
    size = -(-len(points) // count)
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
