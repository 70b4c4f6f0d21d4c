"""Choosing between designs: tuning one, comparing several."""

from metaoptim.design.compare import compare
from metaoptim.design.study import Pick, Row, Tuning
from metaoptim.design.tune import tune

__all__ = ["Pick", "Row", "Tuning", "compare", "tune"]
