"""Figures of evaluation results."""

from metaoptim.report.figures import draw

__all__ = ["draw"]
