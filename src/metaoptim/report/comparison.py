"""The picture of a comparison: how far each method is from the best, and how all of them learnt."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from metaoptim.report.style import MORE, save, sheet

WRAP = 22  # characters of a name per line
LINES = {"over_episodes": (0.0, 4.0, None), "over_seeds": (0.18, 1.5, "0.3")}  # how far below the dot, how wide, its colour
LOG_FROM = 20  # a loss that falls by more than this is drawn on a logarithmic axis


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of what `Comparison.json` gives: a forest of differences, and validations against steps and seconds."""
    methods = comparison["methods"]
    colours = {method["name"]: MORE[i % len(MORE)] for i, method in enumerate(methods)}
    figure = sheet(13, max(4.2, 1.2 + 0.6 * len(methods)))
    forest, by_steps, by_seconds = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _forest(forest, comparison, colours)
    for axes, key, label in ((by_steps, "step", "outer steps"), (by_seconds, "seconds", "seconds of training")):
        _curves(axes, comparison, colours, key, label)
    handles, labels = by_steps.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower right", ncols=min(len(labels), 4), frameon=False)
    save(figure, path)


def _forest(axes: Axes, comparison: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Each method's difference to the best: a dot, a thick line over episodes, and below it a thin one over seeds."""
    methods, percent = comparison["methods"], comparison["metric"] == "accuracy"
    scale, best = 100 if percent else 1, methods[0]["name"]
    names = [method["name"] for method in methods]
    axes.axvline(0, color="0.6", linewidth=1)
    axes.plot(0, 0, "D", color=colours[best], markersize=7)
    for place, name in enumerate(names[1:], 1):
        pair = next(p for p in comparison["pairs"] if {p["first"], p["second"]} == {name, best})
        sign = scale if pair["first"] == name else -scale
        for key, (lower, width, colour) in LINES.items():
            if pair[key] is not None:
                told = key.replace("_", " ") if place == 1 else None
                axes.plot(sign * np.array(pair[key]), [place + lower] * 2, color=colour or colours[name], linewidth=width,
                          marker="|", markersize=8, solid_capstyle="butt", label=told)  # fmt: skip
        axes.plot(sign * pair["difference"], place, "o", color=colours[name], markeredgecolor="white", markersize=9)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, WRAP) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"{'accuracy, points' if percent else 'loss'}, minus that of {textwrap.shorten(best, 40, placeholder='…')}")
    axes.set_title("difference to the best, 95 % intervals")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _curves(axes: Axes, comparison: Mapping[str, Any], colours: Mapping[str, str], key: str, label: str) -> None:
    """Validation scores of every seed, with the mean over the seeds as a thick line."""
    metric = comparison["metric"]
    scale, values = 100 if metric == "accuracy" else 1, []
    for method in comparison["methods"]:
        known = ([point for point in curve if point.get(metric) is not None] for curve in method["curves"])
        curves = [[(point[key], scale * point[metric]) for point in curve] for curve in known if curve]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*curve, strict=True), color=colours[method["name"]], linewidth=0.8, alpha=0.45)
        if curves:
            length = min(map(len, curves))  # early stopping may have ended some
            mean = np.mean([curve[:length] for curve in curves], 0)
            axes.plot(mean[:, 0], mean[:, 1], "o-", color=colours[method["name"]], markersize=3.5, label=method["name"])
        values += [y for curve in curves for _, y in curve]
    axes.set_xlabel(label)
    axes.set_ylabel("validation accuracy, %" if metric == "accuracy" else "validation loss")
    if not values:
        axes.text(0.5, 0.5, "nothing was validated", ha="center", va="center", transform=axes.transAxes, color="0.4")
    elif metric != "accuracy" and min(values) > 0 and max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
