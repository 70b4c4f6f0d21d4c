"""Charts as SVG: axes, lines with bands, dots, bars and heat maps, and where on them each value is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from metaoptim.report.html.document import GREY, Axis, Chart, HeatMap, Number, Series
from metaoptim.report.html.scales import Scale, cut, scale, short, ticks, width

COLOURS = 7
MARKS = ("circle", "square", "triangle", "diamond")
SHADES, STRIP = 24, 44.0  # of the scale of a heat map's colours: steps, and its height
FAINTEST = 0.15  # of these colours, for none is that of the page: a cell that has it has no value
STAR = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5), 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
TURNED = 50, 0.77  # degrees that long names are turned by, and the sine


@dataclass(frozen=True)
class Drawn:
    """An SVG, and the place of each of the figure's spots in it; none: the whole height."""

    svg: Markup
    spots: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Frame:
    """The size of a picture, and the scales of its axes."""

    width: float
    height: float
    x: Scale
    y: Scale


def tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; texts and values of attributes are escaped, `_` in names of attributes is `-`."""
    known = {key.rstrip("_").replace("_", "-"): x for key, x in attributes.items() if x is not None}
    told = Markup("").join(Markup(' {}="{}"').format(key, _number(x)) for key, x in known.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), told, Markup("").join(children))


def _number(x: object) -> object:
    return f"{x:.1f}".removesuffix(".0") if isinstance(x, float) else x


def positions(chart: Chart) -> list[float]:
    """Where values can be read: each x of a series that is not faint; where y has names, each of these."""
    if chart.y.names:
        return [float(i) for i in range(len(chart.y.names))]
    return sorted({float(x) for s in chart.series if not s.faint for x in s.x})


def draw(figure: Chart | HeatMap, across: float) -> Drawn:
    """The figure, so many pixels wide."""
    return _chart(figure, across) if isinstance(figure, Chart) else _heat_map(figure, across)


def _chart(chart: Chart, across: float) -> Drawn:
    xs = [x for s in chart.series for x in s.x] + [g.value for g in chart.guides if g.along == "x"]
    ys = [y for s in chart.series for y in s.y] + [g.value for g in chart.guides if g.along == "y"]
    ends = [v for s in chart.series for v in (*s.low, *s.high)] + [0.0 for s in chart.series if s.shape == "bars"]
    of_x, of_y = (ends, []) if chart.y.names else ([], ends)
    bounds = (None, None), chart.bounds
    height = 34.0 * len(chart.y.names) + 56 if chart.y.names else (330.0 if across > 700 else 270.0)
    frame = _frame(chart.x, chart.y, [*xs, *of_x], [*ys, *of_y], bounds[:: -1 if chart.y.names else 1], across, height)
    body = [*_axes(chart.x, chart.y, frame), *_guides(chart, frame)]
    for series in sorted(chart.series, key=lambda s: not s.faint):
        body += _bars(chart, series, frame) if series.shape == "bars" else _points(chart, series, frame)
    spots = [(frame.x(at), None) if not chart.y.names else (_middle(chart, at, frame), frame.y(at)) for at in positions(chart)]
    return Drawn(_svg(frame, body), tuple(spots))


def _middle(chart: Chart, at: float, frame: Frame) -> float:
    """Where along a line of names its values are."""
    known = [frame.x(x) for s in chart.series for x, y in zip(s.x, s.y, strict=True) if y == at]
    return sum(known) / len(known) if known else frame.x.start


def _frame(
    x: Axis, y: Axis, xs: Sequence[Number], ys: Sequence[Number], bounds: tuple[tuple[Number, Number], ...], across: float,
    height: float,
) -> Frame:  # fmt: skip
    """Margins as wide as the labels need them."""
    names = max((width(name) for name in y.names), default=0.0)
    lines = ticks(y, scale(y, ys, bounds[1], 0, 1), 5)
    left = min(names + 12, across * 0.42) if y.names else 32 + max((width(text) for _, text in lines), default=20.0)
    room = across - left - 14
    longest = max((width(name) for name in x.names), default=0.0)
    turned = bool(x.names) and longest > room / len(x.names) - 6
    below = (46.0 if x.label else 28.0) + (min(longest, 120.0) * TURNED[1] - 8 if turned else 0)
    height += below - 46
    down = (10.0, height - below) if y.names else (height - below, 10.0)
    return Frame(across, height, scale(x, xs, bounds[0], left, across - 14), scale(y, ys, bounds[1], *down))


def _axes(x: Axis, y: Axis, frame: Frame, grid: bool = True) -> Iterator[Markup]:
    top, bottom = sorted((frame.y.start, frame.y.end))
    left, right = frame.x.start, frame.x.end
    for value, text in ticks(y, frame.y, 5):
        if grid and not y.names:
            yield tag("line", class_="grid", x1=left, x2=right, y1=frame.y(value), y2=frame.y(value))
        shown = cut(text, left - 10) if y.names else text
        yield tag("text", shown, class_="tick", x=left - 8, y=frame.y(value) + 4, text_anchor="end")
    marks = ticks(x, frame.x, max(3, int((right - left) / 70)))
    each = (right - left) / max(len(x.names), 1)
    turned = bool(x.names) and max(map(width, x.names)) > each - 6
    every = max(1, math.ceil(len(marks) * 16 / (right - left))) if turned else 1
    for value, text in marks[::every]:
        place = frame.x(value)
        if grid and not x.names:
            yield tag("line", class_="grid", x1=place, x2=place, y1=top, y2=bottom)
        if turned:
            shown, at = cut(text, 120.0), f"rotate(-{TURNED[0]} {place + 4:.1f} {bottom + 14:.1f})"
            yield tag("text", shown, class_="tick", x=place + 4, y=bottom + 14, text_anchor="end", transform=at)
        else:
            yield tag("text", text, class_="tick", x=place, y=bottom + 18, text_anchor="middle")
    yield tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    if x.label:
        yield tag("text", x.label, class_="label", x=(left + right) / 2, y=frame.height - 6, text_anchor="middle")
    if y.label and not y.names:
        middle = (top + bottom) / 2
        turn = f"rotate(-90 13 {middle:.1f})"
        yield tag("text", cut(y.label, bottom - top + 20), class_="label", x=13, y=middle, text_anchor="middle", transform=turn)


def _guides(chart: Chart, frame: Frame) -> Iterator[Markup]:
    top, bottom = sorted((frame.y.start, frame.y.end))
    for guide in chart.guides:
        if guide.along == "x":
            at = frame.x(guide.value)
            yield tag("line", class_="guide", x1=at, x2=at, y1=top, y2=bottom)
            late = at > (frame.x.start + frame.x.end) / 2
            yield tag("text", guide.label, class_="note", x=at + (-5 if late else 5), y=top + 11,
                      text_anchor="end" if late else "start")  # fmt: skip
        else:
            at = frame.y(guide.value)
            yield tag("line", class_="guide", x1=frame.x.start, x2=frame.x.end, y1=at, y2=at)
            yield tag("text", guide.label, class_="note", x=frame.x.end - 4, y=at - 5, text_anchor="end")


def _colour(series: Series) -> str:
    return "grey" if series.colour == GREY else f"c{series.colour % COLOURS}"


def _points(chart: Chart, series: Series, frame: Frame) -> Iterator[Markup]:
    """A line with its band, or dots with whiskers."""
    colour = _colour(series)
    points = [(frame.x(x), frame.y(y), i) for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)) if y is not None]
    if series.shape == "line":
        if series.low:
            yield tag("path", class_=f"band {colour}", d=_band(series, frame))
        style = f"line {colour}{' dashed' if series.dashed else ''}{' faint' if series.faint else ''}"
        yield tag("path", class_=style, d=_path(series, frame))
        if len(points) > 1 and not series.marked:
            return
    for x, y, i in points:
        own = series.of_point(i)
        if series.shape == "dots" and series.low and series.low[i] is not None and series.high[i] is not None:
            yield _whisker(chart, own, i, x, y, frame)
        yield _mark(x, y, own, 4.5 if series.shape == "dots" else 3.2)


def _mark(x: float, y: float, series: Series, size: float) -> Markup:
    style = f"mark {_colour(series)}{' faint' if series.faint else ''}"
    kind = MARKS[series.colour % len(MARKS)] if series.shape == "dots" else MARKS[0]
    if kind == "circle":
        return tag("circle", class_=style, cx=x, cy=y, r=size)
    corners = {"square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
               "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0))}[kind]  # fmt: skip
    return tag("path", class_=style, d=_polygon([(x + size * a, y + size * b) for a, b in corners]))


def _whisker(chart: Chart, series: Series, i: int, x: float, y: float, frame: Frame) -> Markup:
    low, high = series.low[i] or 0.0, series.high[i] or 0.0
    if chart.y.names:
        return tag("line", class_=f"whisker {_colour(series)}", x1=frame.x(low), x2=frame.x(high), y1=y, y2=y)
    return tag("line", class_=f"whisker {_colour(series)}", x1=x, x2=x, y1=frame.y(low), y2=frame.y(high))


def _bars(chart: Chart, series: Series, frame: Frame) -> Iterator[Markup]:
    groups = [s for s in chart.series if s.shape == "bars"]
    apart = abs(frame.x(1) - frame.x(0)) if chart.x.names else 14.0
    wide = min(0.7 * apart / len(groups), 64.0)
    shift = (groups.index(series) - (len(groups) - 1) / 2) * wide
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if y is None:
            continue
        place, top, base = frame.x(x) + shift, frame.y(y), frame.y(max(0.0, frame.y.low))
        up, down = sorted((top, base))
        yield tag("rect", class_=f"bar {_colour(series)}", x=place - wide / 2, y=up, width=wide, height=max(down - up, 0.5))
        if series.low and series.low[i] is not None and series.high[i] is not None:
            yield tag("line", class_="whisker ink", x1=place, x2=place, y1=frame.y(series.low[i] or 0.0),
                      y2=frame.y(series.high[i] or 0.0))  # fmt: skip


def _path(series: Series, frame: Frame) -> str:
    text, pen = "", "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pen = "M"
            continue
        text += f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}"
        pen = "L"
    return text


def _band(series: Series, frame: Frame) -> str:
    """One area for each stretch in which both ends are known."""
    text, stretch = "", list[tuple[float, float, float]]()
    for x, low, high in [*zip(series.x, series.low, series.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None:
            stretch.append((frame.x(x), frame.y(low), frame.y(high)))
        elif stretch:
            text += _polygon([*((x, up) for x, _, up in stretch), *((x, down) for x, down, _ in reversed(stretch))])
            stretch = []
    return text


def _polygon(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"


def _heat_map(figure: HeatMap, across: float) -> Drawn:
    count = len(figure.rows)
    frame = _frame(figure.x, figure.y, [], [], ((None, None), (None, None)), across, min(28.0 * count, across * 0.8) + 62)
    size = abs(frame.x(1) - frame.x(0)), abs(frame.y(1) - frame.y(0))
    body, spots = [*_axes(figure.x, figure.y, frame, grid=False)], []
    for j, row in enumerate(figure.rows):
        for i, value in enumerate(row):
            x, y = frame.x(i), frame.y(j)
            spots.append((x, y))
            if value is not None:
                body.append(_shade(figure, value, "cell", x=x - size[0] / 2, y=y - size[1] / 2, width=size[0], height=size[1]))
    if figure.picked is not None:
        x, y, large = frame.x(figure.picked[0]), frame.y(figure.picked[1]), 0.42 * min(*size, 26.0)
        body.append(tag("path", class_="star", d=_polygon([(x + large * r * a, y + large * r * b) for a, b, r in STAR])))
    body += _strip(figure, frame)
    return Drawn(_svg(replace(frame, height=frame.height + STRIP), body), tuple(spots))


def _shade(figure: HeatMap, value: float, style: str, **place: float) -> Markup:
    """A rectangle in the colour of a value."""
    opacity = f"{_strength(figure, value):.2f}"
    return tag("rect", class_=f"{style} {'c1' if value < 0 else 'c0'}", fill_opacity=opacity, **place)


def _strip(figure: HeatMap, frame: Frame) -> Iterator[Markup]:
    """Which colour is which value, below the map."""
    left, top, each = frame.x.start, frame.height + 8, (frame.x.end - frame.x.start) / SHADES
    for i in range(SHADES):
        value = figure.low + (figure.high - figure.low) * (i + 0.5) / SHADES
        yield _shade(figure, value, "shade", x=left + i * each, y=top, width=each, height=10.0)
    below, right = top + 26, frame.x.end
    yield tag("text", short(figure.low), class_="tick", x=left, y=below, text_anchor="start")
    yield tag("text", figure.label, class_="label", x=(left + right) / 2, y=below, text_anchor="middle")
    yield tag("text", short(figure.high), class_="tick", x=right, y=below, text_anchor="end")


def _strength(figure: HeatMap, value: float) -> float:
    """How strong a cell's colour is: from zero on both ways where there are negative values, else from the lowest on."""
    if figure.low < 0:
        share = abs(value) / max(-figure.low, figure.high)
    else:
        share = (value - figure.low) / (figure.high - figure.low or 1.0)
    return FAINTEST + (1 - FAINTEST) * min(max(share, 0.0), 1.0)


def _svg(frame: Frame, body: Sequence[Markup]) -> Markup:
    box = f"0 0 {frame.width:.0f} {frame.height:.0f}"
    bottom, top = max(frame.y.start, frame.y.end), min(frame.y.start, frame.y.end)
    cross = tag("line", class_="cross", x1=0, x2=0, y1=top, y2=bottom)
    return tag("svg", *body, cross, viewBox=box, width=f"{frame.width:.0f}", height=f"{frame.height:.0f}", aria_hidden="true")
