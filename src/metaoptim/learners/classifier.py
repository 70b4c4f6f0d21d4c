"""One classifier of all training classes, on the features that the head of a network reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.types import Batch, Info, MetaParams, Params
from metaoptim.learners.network import Network, pair
from metaoptim.nn import directions, scale_of


@dataclass(frozen=True)
class Classifier:
    """A linear layer on the features, or one of cosines; its weights are ψ, and its loss is that of a pooled batch.

    classes: how many there are; cosine: whether logits are cosines; scale: what these are multiplied by; none: 2 for up to 200
    classes, else 10.
    """

    classes: int
    cosine: bool = False
    scale: float | None = None

    def start(self, network: Network, generator: torch.Generator) -> Params:
        """ψ: classifier.weight (C, D) and, if linear, classifier.bias (C), drawn from U[−1/√D, 1/√D] as `nn.Linear` does."""
        like, width = next(network.net.parameters()), network.width
        shapes = {"classifier.weight": (self.classes, width)} | ({} if self.cosine else {"classifier.bias": (self.classes,)})

        def draw(shape: tuple[int, ...]) -> Tensor:  # where the generator is, so that every device starts from the same numbers
            u = torch.rand(shape, dtype=like.dtype, generator=generator, device=generator.device)
            return (2 * u - 1).div(math.sqrt(width)).to(like.device)

        return {name: draw(shape) for name, shape in shapes.items()}

    def logits(self, rule: Params, z: Tensor) -> Tensor:
        """(B, C) of features (B, D)."""
        if not self.cosine:
            return F.linear(z, rule["classifier.weight"], rule["classifier.bias"])
        scale = scale_of(self.classes) if self.scale is None else self.scale
        return scale * directions(z) @ directions(rule["classifier.weight"]).mT

    def __call__(self, network: Network, phi: MetaParams, batch: Batch) -> tuple[Tensor, Info]:
        """The mean loss of examples (x, y) with the numbers of their classes, and the accuracy."""
        x, y = pair(batch)
        return network.judge(self.logits(phi.rule, network.features(phi.weights, x, None)), y)
