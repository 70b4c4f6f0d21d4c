"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from metaoptim.learners.closed_form import ClosedForm
from metaoptim.learners.gradient import GradientLearner, Inner
from metaoptim.learners.masks import Mask, mask
from metaoptim.learners.network import Network, modules, network_of, placed, with_network

__all__ = [
    "ClosedForm", "GradientLearner", "Inner", "Mask", "Network", "mask", "modules", "network_of", "placed", "with_network",
]  # fmt: skip
