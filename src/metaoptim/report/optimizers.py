"""Loss curves of learned optimizers beside tuned baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from metaoptim.report.style import MORE, save, sheet

if TYPE_CHECKING:
    from metaoptim.lopt.judgement import Judgement

COLUMNS = 3


def draw(judgement: Judgement, path: Path) -> None:
    """Writes a PNG with a panel for each family: medians, and bands from the first to the ninth decile of the runs."""
    families = judgement.families
    columns = min(COLUMNS, len(families))
    lines = -(-len(families) // columns)
    figure = sheet(4.2 * columns + 1, 3.4 * lines + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (family, rows) in zip(panels, families.items(), strict=False):
        for i, row in enumerate(rows):
            low, middle, high = (x.numpy(force=True) for x in row.quantiles)
            steps, colour = np.arange(len(middle)), MORE[i % len(MORE)]
            width = 2.2 if row.name == judgement.name else 1.2
            style = "--" if i % 2 else "-"  # of two that agree, both are seen
            axes.plot(steps, middle, style, color=colour, label=row.name, linewidth=width)
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        trained = judgement.facts.get("trained_steps")
        if trained and trained < len(rows[0].losses[0]) - 1:
            axes.axvline(trained, color="0.5", linestyle=":", label="meta-trained up to here")
        axes.set_title(family)
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss, in units of knowing nothing")
        axes.grid(alpha=0.3)
    for axes in panels[len(families) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns))
    save(figure, path)
