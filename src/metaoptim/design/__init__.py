"""Choosing between designs: comparing methods."""

from metaoptim.design.compare import compare

__all__ = ["compare"]
