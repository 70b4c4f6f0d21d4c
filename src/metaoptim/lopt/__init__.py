"""Learned optimizers: update rules that are networks, small ones, applied to every weight of another network.

Each is a `Rule`, like those of `metaoptim.rules`, with the weights of its network as ψ.
"""

from metaoptim.lopt.celo2 import Celo2
from metaoptim.lopt.lstm import LSTM
from metaoptim.lopt.small_fc import SmallFC

__all__ = ["LSTM", "Celo2", "SmallFC"]
