"""Helps to design meta-optimizers: the gradient doctor."""

from metaoptim.design.doctor import check
from metaoptim.design.report import Report

__all__ = ["Report", "check"]
