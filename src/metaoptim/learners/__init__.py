"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from metaoptim.learners.closed_form import ClosedForm
from metaoptim.learners.gradient import GradientLearner, Inner
from metaoptim.learners.masks import Mask, Names, mask, named
from metaoptim.learners.network import Network, modules, network_of, nothing, placed, with_network
from metaoptim.learners.starts import HeadStart, head_start

__all__ = [
    "ClosedForm",
    "GradientLearner",
    "HeadStart",
    "Inner",
    "Mask",
    "Names",
    "Network",
    "head_start",
    "mask",
    "modules",
    "named",
    "network_of",
    "nothing",
    "placed",
    "with_network",
]
