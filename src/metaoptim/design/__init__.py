"""Choosing between designs: tuning one, comparing several, and what to try next."""

from metaoptim.design.compare import compare
from metaoptim.design.recommend import recommend
from metaoptim.design.study import Pick, Row, Tuning
from metaoptim.design.tune import tune

__all__ = ["Pick", "Row", "Tuning", "compare", "recommend", "tune"]
