"""A picture of a search: score against inner steps, train steps by test steps, and which keys matter."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaoptim.report.style import COLOURS, save, sheet

if TYPE_CHECKING:
    from metaoptim.design.study import Row, Tuning

BLUE, RED, GREEN, _ = COLOURS
WRAP = 60  # characters of the title per line and panel


def draw(tuning: Tuning, path: Path) -> None:
    """Writes a PNG with up to three panels; those that there are no numbers for are left out."""
    done = [row for row in tuning.rows if row.state == "complete"]
    panels = [_curves if len(done[0].steps) > 1 else _trials]
    if len({row.train_steps for row in done}) > 1 and len(done[0].steps) > 1:
        panels.append(_map)
    if tuning.importances:
        panels.append(_importances)
    figure = sheet(4.8 * len(panels) + 0.6, 4.4)
    figure.suptitle(textwrap.fill(f"{tuning.base.name}: {tuning.facts['protocol']}", WRAP * len(panels)), fontsize=9.5)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(figure, axes, tuning, done)
    save(figure, path)


def _scale(tuning: Tuning) -> tuple[float, str]:
    return (100, "accuracy, %") if tuning.metric == "accuracy" else (1, "loss")


def _curves(figure: Figure, axes: Axes, tuning: Tuning, done: list[Row]) -> None:
    """Every trial's score against test steps; with their intervals the picked one's and the best one's."""
    scale, unit = _scale(tuning)
    best, at = tuning.picked.best[0], tuning.picked.trial
    for row in done:
        axes.plot(row.steps, scale * np.array(row.mean), color="0.75", linewidth=0.8, zorder=1)
    both = ((at, BLUE, "best and picked"),) if best == at else ((best, RED, "best"), (at, BLUE, "picked"))
    seen = [scale * x for row in done for x in row.mean]
    for number, colour, name in both:
        row = next(row for row in done if row.number == number)
        mean, half = scale * np.array(row.mean), 1.96 * scale * np.array(row.error)
        label = f"{name}: trial {number}, {row.train_steps} steps in training"
        axes.plot(row.steps, mean, color=colour, marker="o", markersize=4, label=label, zorder=3)
        seen += list(mean - half)
        axes.fill_between(row.steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0, zorder=2)
    axes.plot(tuning.picked.test_steps, scale * tuning.picked.score, "*", color=BLUE, markersize=14, zorder=4)
    if tuning.picked.rule == "one-se":
        sign = 1 if tuning.metric == "accuracy" else -1
        bound = scale * (tuning.picked.best[2] - sign * tuning.picked.best[3])
        axes.axhline(bound, color=RED, linestyle="--", linewidth=1, label="one standard error from the best")
    if tuning.metric == "loss":
        _cut(axes, seen)
    axes.set_xlabel("inner steps at test")
    axes.set_ylabel(unit)
    axes.set_title("each trial a line; 95 % intervals")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _cut(axes: Axes, values: list[float]) -> None:
    """Leaves out of sight what is far above the median, where a few trials would press the others flat."""
    low, middle = min(values), float(np.median(values))
    top = middle + 2 * (middle - low)
    if low < middle and max(values) > top:
        axes.set_ylim(low - 0.05 * (top - low), top)


def _trials(figure: Figure, axes: Axes, tuning: Tuning, done: list[Row]) -> None:
    """Every trial's score, where runs are judged at their end alone."""
    scale, unit = _scale(tuning)
    for row in done:
        colour = BLUE if row.number == tuning.picked.trial else RED if row.number == tuning.picked.best[0] else "0.5"
        axes.errorbar(row.number, scale * row.mean[0], 1.96 * scale * row.error[0], fmt="o", color=colour, capsize=3)
    axes.set_xlabel("trial")
    axes.set_ylabel(unit)
    axes.set_title("95 % intervals; blue is picked, red the best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _map(figure: Figure, axes: Axes, tuning: Tuning, done: list[Row]) -> None:
    """The best trial of each number of training steps, after each number of test steps."""
    scale, unit = _scale(tuning)
    columns = [k for k in done[0].steps if k in tuning.facts["test_steps"]]
    trained = sorted({row.train_steps for row in done})
    better = np.max if tuning.metric == "accuracy" else np.min
    cells = [
        [scale * better([row.mean[row.steps.index(k)] for row in done if row.train_steps == n]) for k in columns]
        for n in trained
    ]
    found = np.array(cells)
    loss, middle = tuning.metric == "loss", float(np.median(found))
    top = min(found.max(), middle + 2 * (middle - found.min())) if loss and middle > found.min() else found.max()
    shown = axes.imshow(found, aspect="auto", origin="lower", cmap="viridis_r" if loss else "viridis", vmax=top)
    axes.set_xticks(range(len(columns)), [str(k) for k in columns])
    axes.set_yticks(range(len(trained)), [str(n) for n in trained])
    taken = next(row for row in done if row.number == tuning.picked.trial)
    axes.plot(columns.index(tuning.picked.test_steps), trained.index(taken.train_steps), "*", color=RED, markersize=14)
    axes.set_xlabel("inner steps at test")
    axes.set_ylabel("inner steps in training")
    axes.set_title("the best trial of each; ★ is picked")
    figure.colorbar(shown, ax=axes, label=unit)


def _importances(figure: Figure, axes: Axes, tuning: Tuning, done: list[Row]) -> None:
    """The share of each key, largest on top."""
    keys, shares = zip(*reversed([*tuning.importances.items()]), strict=True)
    axes.barh(range(len(keys)), [100 * share for share in shares], 0.6, color=GREEN, alpha=0.8)
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xlabel("share, %")
    axes.set_title("what makes a trial one of the best quarter")
    axes.grid(alpha=0.3, axis="x")
