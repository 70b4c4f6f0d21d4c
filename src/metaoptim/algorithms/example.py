"""The small network that an algorithm is tried on: by the tests that every algorithm passes, and by `metaoptim check NAME`.

An algorithm that needs another one says so in its own file, by a function `example_net(ways)`.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from metaoptim.algorithms import ALGORITHMS
from metaoptim.nn import BatchNorm, LayerNorm

INPUT = (1, 4, 4)
"""The shape of one input."""


def example_net(name: str, ways: int = 3, seed: int = 0) -> nn.Module:
    """A network (B, 1, 4, 4) -> (B, ways) that suits the algorithm of that name."""
    make: Callable[[int], nn.Module] = getattr(sys.modules[ALGORITHMS[name].__module__], "example_net", plain_net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(ways)


def plain_net(ways: int) -> nn.Module:
    """Convolutions, both norms, a hidden layer and a head; every weight matters (no bias ahead of a batch norm)."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
            norm=BatchNorm(3),
            tanh=nn.Tanh(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(12, 5),
            layer_norm=LayerNorm(5),
            features=nn.Tanh(),
            head=nn.Linear(5, ways),
        )
    )
