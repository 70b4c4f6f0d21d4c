"""A picture for each reading of a diagnosis, with its sentence on top."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaoptim.diagnosis import Diagnosis
from metaoptim.diagnosis.features import REUSED
from metaoptim.report.style import COLOURS, save, sheet

BLUE, RED, GREEN, _ = COLOURS
GREY = "0.6"
WRAP = 112  # characters of a sentence per line

Numbers = Mapping[str, Any]


def draw_diagnosis(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Writes READING.png for every reading; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for reading in diagnosis.readings:
        figure = sheet(8, 4.4)
        figure.suptitle(textwrap.fill(reading.sentence, WRAP), fontsize=9.5)
        DRAWN[reading.name](figure, reading.numbers)
        paths.append(folder / f"{reading.name}.png")
        save(figure, paths[-1])
    return paths


def _steps(figure: Figure, numbers: Numbers) -> None:
    """Every score against inner steps, with the number of steps in training."""
    for axes, metric in zip(figure.subplots(1, len(numbers["mean"]), squeeze=False)[0], numbers["mean"], strict=True):
        scale, unit = (100, ", %") if metric == "accuracy" else (1, "")
        mean, half = (scale * np.array(numbers[part][metric], float) for part in ("mean", "interval"))
        steps = np.arange(len(mean))
        axes.plot(steps, mean, color=BLUE, marker="o", markersize=4)
        axes.fill_between(steps, mean - half, mean + half, color=BLUE, alpha=0.2, linewidth=0)
        axes.axvline(numbers["training_steps"], color=GREY, linestyle="--", label="steps in training")
        axes.set_xlabel("inner steps")
        axes.set_ylabel(f"query {metric}{unit}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()


def _gain(figure: Figure, numbers: Numbers) -> None:
    """Before, after, and after steps on shuffled targets."""
    axes, percent = figure.subplots(), numbers["metric"] == "accuracy"
    bars = {"before": GREY, "after": BLUE, "shuffled": RED}
    rows = [(name, numbers[name], colour) for name, colour in bars.items() if numbers[name] is not None]
    scale = 100 if percent else 1
    for i, (_, score, colour) in enumerate(rows):
        axes.bar(i, scale * score["mean"], 0.6, yerr=scale * score["interval"], color=colour, alpha=0.8, capsize=6)
    labels = {"before": "before the steps", "after": "after them", "shuffled": "after, targets shuffled"}
    axes.set_xticks(range(len(rows)), [labels[name] for name, *_ in rows])
    axes.set_ylabel("query accuracy, %" if percent else "query loss")
    axes.grid(alpha=0.3, axis="y")


def _permutations(figure: Figure, numbers: Numbers) -> None:
    """The mean under each assignment, and the mean worst and best of an episode."""
    axes = figure.subplots()
    rows = [(name, numbers[name]) for name in ("before", "after") if numbers[name] is not None]
    for i, (_, spread) in enumerate(rows):
        ends = [100 * spread["worst"], 100 * spread["best"]]
        axes.plot([i, i], ends, color=GREY, linewidth=8, alpha=0.5, solid_capstyle="butt",
                  label="" if i else "an episode's worst and best")  # fmt: skip
        means = 100 * np.array(spread["means"])
        axes.plot(i + np.linspace(-0.12, 0.12, len(means)), means, "o", color=BLUE, label="" if i else "mean of an assignment")
    axes.set_xticks(range(len(rows)), [f"{name} adaptation" for name, _ in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("query accuracy, %")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()


def _features(figure: Figure, numbers: Numbers) -> None:
    """CKA by layer, from the input to the output, and what shuffled rows have."""
    axes, layers = figure.subplots(), numbers["layers"]
    places = np.arange(len(layers))
    axes.bar(places, [layer["cka"] for layer in layers], 0.6, alpha=0.8,
             color=[RED if layer["head"] else BLUE for layer in layers])  # fmt: skip
    axes.plot(places, [layer["by_chance"] for layer in layers], "k_", markersize=16, label="rows shuffled")
    axes.axhline(REUSED, color=GREY, linestyle="--", label=f"reused from {REUSED} on")
    axes.set_xticks(places, [layer["layer"] or "all" for layer in layers], rotation=40, ha="right")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("linear CKA, before and after")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _step_sizes(figure: Figure, numbers: Numbers) -> None:
    """Mean and range by layer; red where some are negative."""
    axes, layers = figure.subplots(), numbers["layers"]
    for i, layer in enumerate(layers):
        colour = RED if layer["negative"] > 0 else BLUE
        axes.plot([i, i], [layer["least"], layer["most"]], color=colour, linewidth=6, alpha=0.4, solid_capstyle="butt")
        axes.plot(i, layer["mean"], "o", color=colour, label="" if i else "mean, least and most")
        axes.plot(i, layer["mean_at_start"], "_", color="k", markersize=14, label="" if i else "mean before training")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xticks(range(len(layers)), [layer["layer"] for layer in layers], rotation=40, ha="right")
    axes.set_ylabel("learnt step size")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()


def _alignment(figure: Figure, numbers: Numbers) -> None:
    """Cosines of every support's gradient with every query's; a task's own are on the diagonal."""
    axes = figure.subplots()
    shown = axes.imshow(np.array(numbers["support_and_query"], float), cmap="coolwarm", vmin=-1, vmax=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("query of task")
    axes.set_ylabel("support of task")
    figure.colorbar(shown, ax=axes, label="cosine of the gradients at φ")


def _curvature(figure: Figure, numbers: Numbers) -> None:
    """The largest eigenvalue along the path, and its product with α where there is one."""
    steps, product = numbers["steps"], numbers["product"]
    panels = {"largest eigenvalue λ": numbers["largest_eigenvalue"]} | ({"α·λ": product} if product else {})
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot(steps, values["mean"], "o-", color=BLUE, label="mean over episodes")
        axes.plot(steps, values["most"], "_", color=BLUE, markersize=14, label="largest")
        if values is product:
            axes.axhline(numbers["limit"], color=RED, linestyle="--", label=f"limit, {numbers['limit']:g}")
        axes.set_xlabel("inner step")
        axes.set_xticks(steps)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()


DRAWN: dict[str, Callable[[Figure, Numbers], None]] = {
    "steps": _steps,
    "gain": _gain,
    "permutations": _permutations,
    "features": _features,
    "step_sizes": _step_sizes,
    "alignment": _alignment,
    "curvature": _curvature,
}
"""How each reading is drawn."""
