"""Where the head starts in a task, in place of where it was learnt to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from metaoptim.core.types import Batch, Params
from metaoptim.learners.masks import Names, mask
from metaoptim.learners.network import Network
from metaoptim.nn import uniform

Start = Literal["equal", "zero", "fresh"]


@dataclass(frozen=True)
class HeadStart:
    """The start of a linear head, at which no class is told from another.

    names: its weights and bias. start: "equal" (every class has the mean of the rows, and no bias), "zero", or "fresh" (drawn
    anew for every task, within ±1/√D uniformly for D features, as torch draws a linear layer).
    """

    names: Names
    start: Start

    def __call__(self, weights: Params, support: Batch) -> Params:
        head = {n: weights[n] for n in self.names.names}
        if self.start == "zero":
            return {n: torch.zeros_like(p) for n, p in head.items()}
        if self.start == "equal":
            return {n: p.mean(0, keepdim=True).expand(p.shape) if p.ndim > 1 else torch.zeros_like(p) for n, p in head.items()}
        bound = max((p[0].numel() for p in head.values() if p.ndim > 1), default=1) ** -0.5
        return {n: bound * (2 * u - 1) for n, u in uniform(head).items()}


def head_start(network: Network, start: Start) -> HeadStart:
    """The start of the linear layer in a network's head; a ValueError where the head has more than one, or none."""
    inside, weights = mask(network, "head"), network.weights()
    layers = {n.rpartition(".")[0] for n, p in weights.items() if network.in_head(n) and p.ndim > 1}
    if len(layers) != 1:
        raise ValueError(
            f"the head `{network.head_name}` has {len(layers)} layers with matrices, and must have one, whose rows are the "
            "classes; name the last layer with head=."
        )
    return HeadStart(Names(tuple(n for n in weights if inside(n) and n.rpartition(".")[0] in layers)), start)
