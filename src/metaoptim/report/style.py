"""What all pictures share: their colours, and how they are written."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metaoptim.runs.store import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable with any kind of colour vision

MORE = (*COLOURS, "#56b4e9", "#e69f00", "#000000")


def sheet(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_atomic(path, picture.getvalue())
