"""Figures of what was measured."""

from metaoptim.report.figures import draw

__all__ = ["draw"]
