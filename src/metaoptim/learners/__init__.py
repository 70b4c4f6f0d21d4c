"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from metaoptim.learners.gradient import ClosedForm, GradientLearner, Inner, Network, everything

__all__ = ["ClosedForm", "GradientLearner", "Inner", "Network", "everything"]
