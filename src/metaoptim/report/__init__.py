"""Figures of evaluation results, and of diagnoses."""

from metaoptim.report.diagnosis import draw_diagnosis
from metaoptim.report.figures import draw

__all__ = ["draw", "draw_diagnosis"]
