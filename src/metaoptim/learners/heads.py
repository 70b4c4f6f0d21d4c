"""A head for each training task, on the features that the head of a network reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.types import Batch, Info, MetaParams, Params
from metaoptim.learners.network import Network


@dataclass(frozen=True)
class Heads:
    """M linear layers on the features; their weights are ψ, and their loss is that of a batch of one training task.

    A batch is (x, y, number): `number` says for every example which training task it is of, 0 … M−1, the same one for all. With
    one head, pairs (x, y) are batches too.

    heads: how many there are, M; outputs: of each, such as the classes of the largest task; none: as many as the network has.
    """

    heads: int
    outputs: int | None = None
    own: ClassVar[frozenset[str]] = frozenset({"heads.weight", "heads.bias"})
    """What of ψ is a training task's own: no other task has a gradient there."""

    def start(self, network: Network, generator: torch.Generator) -> Params:
        """ψ: heads.weight (M, C, D) and heads.bias (M, C), drawn from U[−1/√D, 1/√D] as `nn.Linear` does."""
        like, width, outputs = next(network.net.parameters()), network.width, self.outputs or network.outputs

        def draw(*shape: int) -> Tensor:  # where the generator is, so that every device starts from the same numbers
            u = torch.rand(shape, dtype=like.dtype, generator=generator, device=generator.device)
            return (2 * u - 1).div(math.sqrt(width)).to(like.device)

        return {"heads.weight": draw(self.heads, outputs, width), "heads.bias": draw(self.heads, outputs)}

    def __call__(self, network: Network, phi: MetaParams, batch: Batch) -> tuple[Tensor, Info]:
        """The mean loss of one training task's examples by its head, and the accuracy where targets are classes."""
        x, y, number = self.parts(batch)
        weight, bias = (phi.rule[f"heads.{n}"].index_select(0, number[:1]).squeeze(0) for n in ("weight", "bias"))
        return network.judge(F.linear(network.features(phi.weights, x, None), weight, bias), y)

    def parts(self, batch: Batch) -> tuple[Any, Any, Tensor]:
        """(x, y, number); a ValueError for a batch that doesn't say which head it is for."""
        if isinstance(batch, tuple | list) and len(batch) == 3:
            return batch[0], batch[1], batch[2]
        if isinstance(batch, tuple | list) and len(batch) == 2 and self.heads == 1:
            return batch[0], batch[1], batch[1].new_zeros(1, dtype=torch.int64)
        raise ValueError(
            f"there are {self.heads} heads, one for each training task, and a batch must say whose it is: give (x, y, number) "
            f"with a number from 0 to {self.heads - 1} for every example, as mo.train does for families of such tasks."
        )
