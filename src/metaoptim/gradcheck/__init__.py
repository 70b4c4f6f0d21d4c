"""The gradient doctor: whether a meta-gradient is what it claims to be, and if not, which layer is at fault."""

from metaoptim.core.finite import in_the_data
from metaoptim.gradcheck.causes import in_the_rule, overshoot
from metaoptim.gradcheck.claims import self_check
from metaoptim.gradcheck.compare import Comparison, compare_estimators
from metaoptim.gradcheck.doctor import check
from metaoptim.gradcheck.report import Report

__all__ = ["Comparison", "Report", "check", "compare_estimators", "in_the_data", "in_the_rule", "overshoot", "self_check"]
