"""Choosing between designs: what was tried, and what to try next."""

from metaoptim.design.recommend import recommend as recommend
