"""One picture per evaluation: the score after every inner step, beside some of the episodes it was measured on."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.core.types import Task
from metaoptim.evaluation import Result
from metaoptim.report.style import COLOURS, save, sheet
from metaoptim.runs import Run
from metaoptim.tasks import TaskFamily

EPISODES = 3


def draw(result: Result, run: Run, tasks: TaskFamily, path: Path) -> None:
    """Writes a PNG: curves with their 95 % intervals on the left, the first episodes on the right."""
    figure = sheet(11, 4.6)
    facts = result.facts
    batch = tasks.sample(facts["split"], seed=facts["episode_seed"], start=0, count=min(EPISODES, facts["episodes"]))
    shape = batch.query[0].shape if isinstance(batch.query, tuple) else ()  # a dict has no picture
    images, line = len(shape) == 5, shape[2:] == (1,) and batch.query[1].shape == shape
    if images or line:
        left, right = cast(list[SubFigure], figure.subfigures(1, 2, width_ratios=(1.05, 1)))
        _curves(left.subplots(), result)
        _sheet(right, batch) if images else _fits(right, run, batch, facts["steps"])
    else:
        _curves(figure.subplots(), result)
    save(figure, path)


def _curves(axes: Axes, result: Result) -> None:
    """Scores against inner steps; where there are none, a bar for each row."""
    percent = result.metric == "accuracy"
    scale, metric = (100 if percent else 1), "query accuracy, %" if percent else "query loss"
    steps = np.arange(result.facts["steps"] + 1)
    for i, (colour, row) in enumerate(zip(COLOURS, result.rows, strict=False)):
        mean, half = (scale * np.array(v) for v in (row.mean(result.metric), row.interval(result.metric)))
        if len(steps) == 1:
            axes.bar(i, mean[-1], 0.6, yerr=half[-1], color=colour, alpha=0.8, capsize=6)
            continue
        mean, half = (np.broadcast_to(v, steps.shape) if len(v) == 1 else v for v in (mean, half))
        style = "--" if len(row.mean(result.metric)) == 1 else "-"
        axes.plot(steps, mean, style, color=colour, label=row.name, marker="o" if style == "-" else "")
        axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    if len(steps) == 1:
        axes.set_xticks(range(len(result.rows)), [row.name for row in result.rows])
    else:
        axes.set_xlabel("inner steps")
        axes.set_xticks(steps if len(steps) <= 12 else steps[:: len(steps) // 10])
        axes.legend()
    axes.set_ylabel(metric)
    episodes = plural(result.facts["episodes"], "episode")
    axes.set_title(f"{result.facts['tasks']['family']}, {result.facts['split']}: {episodes}, 95 % intervals")
    axes.grid(alpha=0.3)


def _sheet(figure: SubFigure, batch: Task) -> None:
    """For each episode, a row per class, with support left of the line and query right of it."""
    figure.suptitle("episodes: support | query, a row per class")
    for axes, e in zip(
        figure.subplots(1, batch.query[0].shape[0], squeeze=False)[0], range(batch.query[0].shape[0]), strict=True
    ):
        (xs, ys), (xq, yq) = ((x[e], y[e]) for x, y in batch)
        rows = [_strip(xs[ys == c][:5], xq[yq == c][:5]) for c in range(int(yq.max()) + 1)][:10]
        sheet = torch.cat(rows, 1)
        shown = sheet.movedim(0, -1) if sheet.shape[0] == 3 else sheet.mean(0)
        axes.imshow(shown.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
        axes.axvline(min(5, int((ys == 0).sum())) * (xs.shape[-1] + 2) - 1.5, color=COLOURS[1], linewidth=1)
        axes.set_axis_off()


def _strip(support: Tensor, query: Tensor) -> Tensor:
    """Images (B, C, H, W) side by side: (C, H, B · W), with gaps."""
    images = torch.nn.functional.pad(torch.cat([support, query]), (0, 2, 0, 2))
    return torch.cat(list(images), 2)


def _fits(figure: SubFigure, run: Run, batch: Task, steps: int) -> None:
    """For each episode of a regression on one input: support, truth, and the fit before and after adaptation."""
    all_axes = figure.subplots(batch.query[0].shape[0], 1, squeeze=False, sharex=True)[:, 0]
    for e, axes in enumerate(all_axes):
        (xs, ys), (xq, yq) = ((x[e], y[e]) for x, y in batch)
        seen = torch.cat([xs, xq])
        grid = torch.linspace(float(seen.min()), float(seen.max()), 200, dtype=xq.dtype, device=run.phi.device)[:, None]
        axes.plot(xs.flatten().numpy(force=True), ys.flatten().numpy(force=True), "k^", label="support")
        axes.plot(xq.flatten().numpy(force=True), yq.flatten().numpy(force=True), "k.", alpha=0.5, label="query")
        for k, colour in ((0, "0.6"), (steps, COLOURS[0])):
            module = run.adapt((xs, ys), steps=k)
            with torch.no_grad():
                axes.plot(
                    grid.flatten().numpy(force=True), module(grid).flatten().numpy(force=True), color=colour, label=f"{k} steps"
                )
        axes.grid(alpha=0.3)
    all_axes[0].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    all_axes[-1].set_xlabel("x")
