"""What stands in words behind a figure: the values that its spots tell, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from metaoptim.report.html.document import GREY, Axis, Chart, Episode, HeatMap, Series, Table
from metaoptim.report.html.scales import short
from metaoptim.report.html.svg import COLOURS, positions


class Told(NamedTuple):
    """What a spot tells: where it is, and for each series its colour, name and value."""

    head: str
    rows: tuple[tuple[str, str, str], ...]


def told(figure: Chart | HeatMap) -> list[Told]:
    """What each spot of a figure tells, in the order of its places."""
    if isinstance(figure, HeatMap):
        return [
            Told(f"{x}, {y}", (("", figure.label, value),))
            for y, row in zip(figure.y.names, _cells(figure), strict=True)
            for x, value in zip(figure.x.names, row, strict=True)
        ]
    return [Told(_place(figure, at), tuple(_rows(figure, at))) for at in positions(figure)]


def _cells(figure: HeatMap) -> list[list[str]]:
    """The values of a heat map in words, with a star at the picked one."""
    return [
        [f"{short(value)}{'*' if (i, j) == figure.picked else ''}" for i, value in enumerate(row)]
        for j, row in enumerate(figure.rows)
    ]


def colour_of(series: Series) -> str:
    """The name of a series' colour."""
    return "grey" if series.colour == GREY else f"c{series.colour % COLOURS}"


def _place(chart: Chart, at: float) -> str:
    axis = chart.y if chart.y.names else chart.x
    return _name(axis, at) if axis.names else f"{axis.label} {short(at, 6)}".strip()


def _rows(chart: Chart, at: float) -> Iterator[tuple[str, str, str]]:
    for series in chart.series:
        for i, value in () if series.faint else _at(chart, series, at):
            yield colour_of(series.of_point(i)), series.name, value + (f", {series.notes[i]}" if series.notes else "")


def _at(chart: Chart, series: Series, at: float) -> Iterator[tuple[int, str]]:
    """The points of a series at one place, with their values and intervals."""
    along, values = (series.y, series.x) if chart.y.names else (series.x, series.y)
    for i, (place, value) in enumerate(zip(along, values, strict=True)):
        if place == at:
            yield i, short(value) + _interval(series, i)


def _interval(series: Series, i: int) -> str:
    low, high = (ends[i] if len(ends) else None for ends in (series.low, series.high))
    return "" if low is None or high is None else f" ({short(low)} to {short(high)})"


def table(figure: Chart | HeatMap | Episode) -> Table:
    """All values of a figure."""
    if isinstance(figure, Episode):
        pictures = [(name, p) for name, _, query in figure.classes for p in query]
        rows = tuple((name, p.text, {True: "right", False: "wrong", None: ""}[p.right]) for name, p in pictures)
        return Table(("class", "answer", ""), rows)
    if isinstance(figure, HeatMap):
        lines = zip(figure.y.names, _cells(figure), strict=True)
        header = (f"{figure.y.label} \\ {figure.x.label}".strip(), *figure.x.names)
        return Table(header, tuple((name, *row) for name, row in lines))
    axis: Axis = figure.y if figure.y.names else figure.x
    shown = [s for s in figure.series if not s.faint]
    body = tuple((_name(axis, at), *(_cell(figure, s, at) for s in shown)) for at in positions(figure))
    return Table((axis.label, *(s.name or "value" for s in shown)), body)


def _name(axis: Axis, at: float) -> str:
    return axis.names[int(at)] if axis.names and at == int(at) and 0 <= at < len(axis.names) else short(at, 6)


def _cell(chart: Chart, series: Series, at: float) -> str:
    found = (value + (f", {series.notes[i]}" if series.notes else "") for i, value in _at(chart, series, at))
    return "; ".join(found) or "–"
