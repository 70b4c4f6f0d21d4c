"""Update rules that several papers share; a rule that belongs to one paper stands in that paper's file.

A rule maps gradients to updates that are ADDED to the weights. `Clip` gives gradients, for use ahead of a step in `chain`;
`Schedule` scales updates, for use after one, and `Average` is judged at the mean of where they lead.
"""

from metaoptim.core.gradients import hold
from metaoptim.rules.adam import Adam
from metaoptim.rules.adamw import AdamW
from metaoptim.rules.average import Average
from metaoptim.rules.chain import Chain, chain
from metaoptim.rules.clip import Clip
from metaoptim.rules.hypergradient_descent import HypergradientDescent, adam_hd, sgd_hd
from metaoptim.rules.layer_step_sizes import LayerStepSizes
from metaoptim.rules.momentum import Momentum
from metaoptim.rules.muon import Muon
from metaoptim.rules.nesterov import Nesterov
from metaoptim.rules.rmsprop import RMSprop
from metaoptim.rules.schedule import Schedule
from metaoptim.rules.schedule_free_adamw import ScheduleFreeAdamW
from metaoptim.rules.sgd import SGD
from metaoptim.rules.soap import SOAP

__all__ = [
    "SGD",
    "SOAP",
    "Adam",
    "AdamW",
    "Average",
    "Chain",
    "Clip",
    "HypergradientDescent",
    "LayerStepSizes",
    "Momentum",
    "Muon",
    "Nesterov",
    "RMSprop",
    "Schedule",
    "ScheduleFreeAdamW",
    "adam_hd",
    "chain",
    "hold",
    "sgd_hd",
]
