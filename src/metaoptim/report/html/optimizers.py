"""The judgement of a learned optimizer as sections of a page, from its result.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import variance
from typing import Any

from metaoptim.report.html.document import Axis, Chart, Guide, Score, Section, Series, Table
from metaoptim.report.html.few_shot import forest, written
from metaoptim.report.html.scales import short
from metaoptim.report.html.training import thinned

POINTS = 600  # of a curve, shared by the families
UNIT = "loss, in units of knowing nothing"


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The headline beside the tuned baselines, loss curves for each family, and the table."""
    facts, rows = result["facts"], result["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    means, halves = zip(*(_over_families([row for row in rows if row["name"] == name]) for name in names), strict=True)
    families = list(dict.fromkeys(row["family"] for row in rows))
    about = (
        f"{result['name']}: mean loss over the last tenth of a run, on {len(rows[0]['finals'])} fresh problems of "
        f"{'each of ' if len(families) > 1 else ''}{', '.join(families)}; ± is the 95 % interval."
    )
    head = Score(*written("loss", result["mean"], result["interval"]), "loss", about)
    beside = forest("Beside tuned baselines", names, means, halves, f"final {UNIT}")
    tuned = f"Baselines were tuned over {facts['step_sizes']} step sizes, on other problems."
    told = f"Losses are in units of knowing nothing. {tuned}"
    each = max(40, min(120, POINTS // len(families)))
    charts = tuple(_curves(result, family, each) for family in families)
    bands = "Medians over the runs; bands go from the first to the ninth decile."
    return [Section("Result", (head, beside), told), Section("Loss curves", (*charts, _table(result)), bands)]


def _curves(result: Mapping[str, Any], family: str, count: int) -> Chart:
    rows = [row for row in result["rows"] if row["family"] == family]
    series = []
    for i, row in enumerate(rows):
        low, middle, high = (row["curve"][key] for key in sorted(row["curve"], key=float))
        at = thinned(range(len(middle)), count)
        median, first, ninth = ([x[k] for k in at] for x in (middle, low, high))
        dashed = bool(i % 2)  # of two that agree, both are seen
        series.append(Series(row["name"], [float(k) for k in at], median, first, ninth, colour=i, dashed=dashed))
    last, trained = len(rows[0]["curve"]["0.5"]) - 1, result["facts"].get("trained_steps")
    guides = (Guide(trained, "meta-trained up to here"),) if trained and trained < last else ()
    return Chart(family, Axis("steps", whole=True), Axis(UNIT, log=True), tuple(series), guides)


def _table(result: Mapping[str, Any]) -> Table:
    rows = [
        (
            row["family"], row["name"], f"{short(row['lr'], 2)}{'*' if row['edge'] else ''}", _fixed(row["final"], 3),
            _fixed(row["final_ratio"], 2), _fixed(row["area"], 3), "never" if row["steps"] is None else str(row["steps"]),
            "never" if row["seconds"] is None else short(row["seconds"], 2), short(100 * row["diverged"], 3),
        )
        for row in result["rows"]
    ]  # fmt: skip
    header = ("family", "rule", "step size", "final loss", "× best", "mean loss", "steps", "seconds", "diverged, %")
    about = (
        "× best: the final loss over the best baseline's. Steps and seconds: until the best baseline's final loss. *: the best "
        "step size was the first or the last one that was tried."
    )
    return Table(header, tuple(rows), about=about)


def _fixed(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _over_families(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """The mean of the families' final losses, and half its 95 % interval over problems."""
    finals = [row["finals"] for row in rows]
    if any(x is None for some in finals for x in some):
        return None, None
    mean = sum(sum(some) / len(some) for some in finals) / len(rows)
    if min(map(len, finals)) < 2:
        return mean, None
    return mean, 1.96 * math.sqrt(sum(variance(some) / len(some) for some in finals)) / len(rows)
