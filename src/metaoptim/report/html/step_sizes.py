"""Learnt step sizes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metaoptim.report.html.document import GREY, Axis, Chart, Series

FEW = 24  # values of a layer that are shown one by one
BINS = 16
LINES = 7  # histograms in one figure


def charts(now: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> list[Chart]:
    """Dots of each layer's step sizes (or, of many, their middle 90 %), and their histograms."""
    layers = Axis("", names=tuple(now))
    start = Series("mean before training", list(range(len(now))), [_mean(before[n]) for n in now], shape="dots", colour=GREY)
    if max(map(len, now.values())) <= FEW:
        points = [(i, x, f"step {k}") for i, sizes in enumerate(now.values()) for k, x in enumerate(sizes)]
        dots = Series("learnt", [i for i, *_ in points], [x for _, x, _ in points], shape="dots", notes=[n for *_, n in points])
        return [Chart("Learnt step sizes", layers, Axis("step size"), (start, dots), wide=True)]
    low, middle, high = ([_quantile(x, q) for x in now.values()] for q in (0.05, 0.5, 0.95))
    dots = Series("median and middle 90 %", list(range(len(now))), middle, low, high, "dots")
    found = [Chart("Learnt step sizes", layers, Axis("step size"), (start, dots), wide=len(now) > LINES)]
    if len(now) <= LINES:
        found.append(_histogram(now))
    return found


def _histogram(now: Mapping[str, Sequence[float]]) -> Chart:
    every = [x for sizes in now.values() for x in sizes]
    low, high = _quantile(every, 0.005), _quantile(every, 0.995)
    size = (high - low) / BINS or 1.0
    centres = [low + (i + 0.5) * size for i in range(BINS)]
    series = []
    for i, (name, sizes) in enumerate(now.items()):
        counts = [0] * BINS
        for x in sizes:
            counts[min(max(int((x - low) / size), 0), BINS - 1)] += 1
        series.append(Series(name, centres, [100 * c / len(sizes) for c in counts], colour=i, dashed=bool(i % 2)))
    about = "Those below and above the ends are counted in the first and in the last point."
    return Chart("Their distribution", Axis("step size"), Axis("share of the layer's weights, %"), tuple(series), about=about)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]
