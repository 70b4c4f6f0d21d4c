"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from metaoptim.learners.classes import class_means, embedded, members
from metaoptim.learners.classifier import Classifier
from metaoptim.learners.closed_form import ClosedForm, logarithms
from metaoptim.learners.gradient import GradientLearner, Inner
from metaoptim.learners.heads import Heads
from metaoptim.learners.masks import Mask, Names, in_the_head, mask, named
from metaoptim.learners.network import (
    CHOOSE,
    Network,
    Pooled,
    device_called,
    modules,
    network_of,
    nothing,
    placed,
    with_network,
)
from metaoptim.learners.starts import HeadStart, head_start

__all__ = [
    "CHOOSE",
    "Classifier",
    "ClosedForm",
    "GradientLearner",
    "HeadStart",
    "Heads",
    "Inner",
    "Mask",
    "Names",
    "Network",
    "Pooled",
    "class_means",
    "device_called",
    "embedded",
    "head_start",
    "in_the_head",
    "logarithms",
    "mask",
    "members",
    "modules",
    "named",
    "network_of",
    "nothing",
    "placed",
    "with_network",
]
