"""Update rules."""

from metaoptim.core.gradients import hold
from metaoptim.rules.rules import adam, chain, clip, momentum, sgd

__all__ = ["adam", "chain", "clip", "hold", "momentum", "sgd"]
