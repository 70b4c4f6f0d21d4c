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
        inside = in_the_head(network)
        if which == "body" and len(inside) == sum(1 for _ in network.net.parameters()):
            raise ValueError(
                f"the head `{network.head_name}` has all the weights of the network, so that there is no body: choose another "
                'head by head="NAME", or, where the outputs are features, say so by ways=, in a method that takes it.'
            )
        chosen = inside.__contains__ if which == "head" else lambda name: name not in inside
    else:
        raise ValueError(f"the mask {which!r} is unknown: choose all, head, body, or give a function of a weight's name.")
    return Names(tuple(n for n, _ in network.net.named_parameters() if network.trainable(n) and chosen(n)))


def in_the_head(network: Network) -> frozenset[str]:
    """The names of the head's weights; a ValueError where it has none, or shares one with the rest of the network."""
    name, layer = network.head_name, network.head_layer
    inside = frozenset(n for n, _ in network.net.named_parameters() if network.in_head(n))
    others = network.net.named_modules(memo={layer})  # which passes over the head, whatever names it has
    outside = {id(p): f"{path}.{n}".lstrip(".") for path, m in others for n, p in m.named_parameters(recurse=False)}
    for own, p in layer.named_parameters():
        if id(p) in outside:
            raise ValueError(
                f"`{name}.{own}` is the same tensor as `{outside[id(p)]}`, and this needs the head apart from the rest of the "
                'network: give it weights of its own, choose another head by head="NAME", or take a method that knows no head, '
                "such as maml."
            )
    if not inside:
        raise ValueError(f"the head `{name}` has no weights; name another submodule with head=.")
    return inside


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
