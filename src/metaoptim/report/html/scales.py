"""From values to places on paper: the ends of an axis, its ticks, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

from metaoptim.report.html.document import Axis, Number

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Maps values from low … high to places from start … end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, x = (math.log10(max(v, 1e-300)) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value)  # fmt: skip
        share = (x - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def scale(axis: Axis, values: Iterable[Number], bounds: tuple[Number, Number], start: float, end: float) -> Scale:
    """The scale of an axis that shows these values; bounds are ends that are given."""
    if axis.names:
        return Scale(-0.5, len(axis.names) - 0.5, start, end)
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not axis.log)]
    low, high = (min(known), max(known)) if known else (1.0, 10.0) if axis.log else (0.0, 1.0)
    if axis.log:
        low, high = (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
    elif axis.whole:
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        # Where all values have one sign, nothing is left beyond zero.
        low, high = (0.0 if low >= 0 > low - room else low - room), (0.0 if high <= 0 < high + room else high + room)
    given = [own if end is None else end for own, end in zip((low, high), bounds, strict=True)]
    return Scale(given[0], given[1], start, end, axis.log)


def ticks(axis: Axis, on: Scale, count: int) -> list[tuple[float, str]]:
    """Values with their labels, about so many."""
    if axis.names:
        return [(float(i), name) for i, name in enumerate(axis.names)]
    if on.log:
        return _log_ticks(on, count)
    size = (on.high - on.low) / max(count, 1) or 1.0
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * s for s in STEPS if power * s >= size * 0.999)
    values = _multiples(axis, on, step)
    if len(values) < 2:  # one alone says nothing of the distances between values
        values = _multiples(axis, on, step / 2)
    return list(zip(values, together(values), strict=True))


def _multiples(axis: Axis, on: Scale, step: float) -> list[float]:
    step = max(1.0, round(step)) if axis.whole else step
    first = math.ceil(on.low / step - 1e-9)
    return [i * step for i in range(first, math.floor(on.high / step + 1e-9) + 1)]


def _log_ticks(on: Scale, count: int) -> list[tuple[float, str]]:
    low, high = math.ceil(math.log10(on.low) - 1e-9), math.floor(math.log10(on.high) + 1e-9)
    every = max(1, math.ceil((high - low + 1) / max(count, 1)))
    digits = (1.0,) if high - low >= 2 else (1.0, 2.0, 5.0)
    values = [d * 10.0**p for p in range(low - 1, high + 1) for d in digits if (p - low) % every == 0 or len(digits) > 1]
    return [(v, short(v)) for v in values if on.low <= v * (1 + 1e-9) and v <= on.high * (1 + 1e-9)]


def together(values: Sequence[float]) -> list[str]:
    """Numbers of one axis, with the same number of digits behind the point."""
    if any(v and not 1e-4 <= abs(v) < 1e7 for v in values):
        return [short(v) for v in values]
    digits = next((d for d in range(7) if all(abs(v - round(v, d)) <= 1e-6 * max(map(abs, values)) for v in values)), 7)
    return [minus(f"{v:,.{digits}f}") for v in values]


def short(value: Number, digits: int = 4) -> str:
    """A number by itself, to so many significant digits; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e7:
        return minus(f"{int(value):,}")
    text = f"{value:.{digits}g}"
    if "e" in text:
        head, _, power = text.partition("e")
        return minus(f"{head.rstrip('0').rstrip('.') if '.' in head else head}e{int(power)}")
    return minus(text)


def minus(text: str) -> str:
    """With the sign that is as wide as a digit."""
    return text.replace("-", "−")


def width(text: str, size: float = 12) -> float:
    """About how wide a text is, in pixels."""
    return size * sum(1.0 if east_asian_width(c) in "WF" else 0.6 for c in text)


def cut(text: str, room: float, size: float = 12) -> str:
    """The text, shortened in its middle where it is wider than that."""
    if width(text, size) <= room:
        return text
    keep = len(text)
    while keep > 2 and width(text[:keep], size) > room - size:
        keep -= 1
    return f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"
