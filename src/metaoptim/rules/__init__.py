"""Update rules that several papers share; a rule that belongs to one paper stands in that paper's file.

A rule maps gradients to updates that are ADDED to the weights. `Clip` gives gradients, for use ahead of a step in `chain`;
`Schedule` scales updates, for use after one.
"""

from metaoptim.core.gradients import hold
from metaoptim.rules.adam import Adam
from metaoptim.rules.adamw import AdamW
from metaoptim.rules.chain import Chain, chain
from metaoptim.rules.clip import Clip
from metaoptim.rules.layer_step_sizes import LayerStepSizes
from metaoptim.rules.momentum import Momentum
from metaoptim.rules.nesterov import Nesterov
from metaoptim.rules.rmsprop import RMSprop
from metaoptim.rules.schedule import Schedule
from metaoptim.rules.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Chain",
    "Clip",
    "LayerStepSizes",
    "Momentum",
    "Nesterov",
    "RMSprop",
    "Schedule",
    "chain",
    "hold",
]
