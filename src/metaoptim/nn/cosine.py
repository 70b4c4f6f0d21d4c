"""A head of cosines."""

from __future__ import annotations

import copy

from torch import Tensor, nn

TINY = 1e-12  # below the squared length of any features that tell anything
FEW, SMALL, LARGE = 200, 2.0, 10.0


class Cosine(nn.Linear):
    """scale · cos(w_n, x) + b_n for each of N outputs; (B, D) -> (B, N). Weights, and b if there is one, are those of a linear
    layer, so that state dicts are interchangeable.

    Source: Chen, Liu, Kira, Wang and Huang 2019, https://arxiv.org/abs/1904.04232.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, scale: float | None = None) -> None:
        nn.Linear.__init__(self, inputs, outputs, bias)
        self.scale = scale_of(outputs) if scale is None else scale

    def forward(self, x: Tensor) -> Tensor:
        cosine: Tensor = self.scale * directions(x) @ directions(self.weight).mT
        return cosine if self.bias is None else cosine + self.bias

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, scale={self.scale}"


def scale_of(outputs: int) -> float:
    """What the published code multiplies cosines by: 2 for up to 200 outputs, else 10."""
    return SMALL if outputs <= FEW else LARGE


def directions(x: Tensor) -> Tensor:
    """Rows of length 1, in the direction of those of x (…, D); 0 where that is 0."""
    return x / (x.square().sum(-1, keepdim=True) + TINY).sqrt()


def with_cosines(net: nn.Module, head: str, scale: float | None = None) -> nn.Module:
    """A copy of a network whose head, or the last linear layer in it, is one of cosines with the same weights."""
    made = copy.deepcopy(net)
    linear = [n for n, m in made.get_submodule(head).named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f'the head `{head}` has no linear layer to make one of cosines of; choose another by head="NAME".')
    parent, _, leaf = f"{head}.{linear[-1]}".rstrip(".").rpartition(".")
    layer: nn.Linear = getattr(made.get_submodule(parent), leaf)
    cosine = Cosine(1, layer.out_features, layer.bias is not None, scale)
    cosine.in_features, cosine.weight, cosine.bias = layer.in_features, layer.weight, layer.bias
    setattr(made.get_submodule(parent), leaf, cosine.train(layer.training))
    return made
