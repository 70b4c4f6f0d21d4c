"""Masks: which weights of a network adapt in the inner loop, and which the outer loop learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metaoptim.learners.network import Network

Mask = Literal["all", "head", "body"] | Callable[[str], bool]
"""Which weights: all of them, those of the head, all others, or a function of the name."""


def mask(network: Network, which: Mask) -> Callable[[str], bool]:
    """A mask as a function of the name, among the weights that the module itself wants trained."""
    if callable(which):
        chosen = which
    elif which == "all":
        return network.trainable
    elif which in ("head", "body"):
        head = network.head_name
        inside = frozenset(n for n, _ in network.net.named_parameters() if network.in_head(n))
        if not inside:
            raise ValueError(f"the head `{head}` has no weights; name another submodule with head=.")
        chosen = inside.__contains__ if which == "head" else lambda name: name not in inside
    else:
        raise ValueError(f"the mask {which!r} is unknown: choose all, head, body, or give a function of a weight's name.")
    return Names(tuple(n for n, _ in network.net.named_parameters() if network.trainable(n) and chosen(n)))


def named(network: Network, name: str, advice: str) -> Names:
    """The weights whose own name, as in `block.context`, is that; a ValueError with advice where there is none."""
    found = tuple(n for n, _ in network.net.named_parameters() if n.rpartition(".")[2] == name)
    if not found:
        raise ValueError(f"the network has no weight called `{name}`: {advice}.")
    return Names(found)


@dataclass(frozen=True)
class Names:
    """Names as a mask; two of them are equal, and print alike in every process, where a closure or a set would not."""

    names: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        return name in self.names

    def others(self, name: str) -> bool:
        """The mask of all other names."""
        return name not in self.names
