"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from metaoptim.learners.classes import class_means, embedded, members
from metaoptim.learners.classifier import Classifier
from metaoptim.learners.closed_form import ClosedForm, logarithms
from metaoptim.learners.gradient import GradientLearner, Inner
from metaoptim.learners.masks import Mask, mask
from metaoptim.learners.network import Network, Pooled, network_of, placed, with_network

__all__ = [
    "Classifier",
    "ClosedForm",
    "GradientLearner",
    "Inner",
    "Mask",
    "Network",
    "Pooled",
    "class_means",
    "embedded",
    "logarithms",
    "mask",
    "members",
    "network_of",
    "placed",
    "with_network",
]
