"""Small models of the few-shot literature."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from itertools import pairwise
from typing import Literal, ParamSpec

from torch import Tensor, nn

from metaoptim.nn.modulation import ContextInput, FiLM, Transform
from metaoptim.nn.norms import BatchNorm, LayerNorm

P = ParamSpec("P")
Activation = Literal["relu", "tanh"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class SpatialMean(nn.Module):
    """(B, C, H, W) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


def _recorded(build: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """The same, with the name and the arguments kept in the module, so that a run can write down what it trained."""

    @wraps(build)
    def made(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        net = build(*args, **kwargs)
        given = signature(build).bind(*args, **kwargs)
        given.apply_defaults()
        vars(net)["built_by"] = {"name": build.__name__, **given.arguments}
        return net

    return made


@_recorded
def mlp(
    sizes: Sequence[int] = (1, 40, 40, 1),
    activation: Activation = "relu",
    context: int = 0,
    transforms: bool = False,
    warp: bool = False,
) -> nn.Module:
    """A multi-layer perceptron; (B, sizes[0]) -> (B, sizes[-1]).

    Args:
        sizes: widths from input to output; the default is the sinusoid network of the MAML paper.
        activation: between layers, "relu" or "tanh".
        context: size of a context vector that is put beside every input (CAVIA); 0: none.
        transforms: a matrix after every layer, which does not adapt (T-Net).
        warp: a further linear layer called `warp1`, `warp2`, … after every hidden layer, which starts as the identity (for
            WarpGrad).
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"mlp: sizes={list(sizes)} must name at least an input and an output width, all positive.")
    _offered("mlp", "activation", activation, tuple(_ACTIVATIONS))
    _sized("mlp", context)
    layers: list[nn.Module] = [ContextInput(context)] if context else []
    warps: dict[int, str] = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [_ACTIVATIONS[activation]()] if i else []
        if warp and i:
            warps[len(layers)] = f"warp{i}"
            layers.append(_identity(a))
        layers += [nn.Linear(a if i else a + context, b)]
        layers += [Transform(b)] if transforms else []
    return nn.Sequential(OrderedDict((warps.get(i, str(i)), layer) for i, layer in enumerate(layers)))


@_recorded
def conv4(
    ways: int,
    channels: int = 1,
    size: int = 28,
    filters: int = 64,
    pool: bool = False,
    norm: Literal["batch", "layer", "none"] = "batch",
    features: Literal["mean", "flatten"] = "mean",
    context: int = 0,
    transforms: bool = False,
    warp: bool = False,
) -> nn.Module:
    """Four blocks of 3×3 convolution, norm and ReLU, then a linear head; (B, channels, size, size) -> (B, ways).

    The network of Vinyals 2016, with strides instead of pooling, as in the MAML paper's Omniglot runs.

    Args:
        ways: number of classes N.
        channels: colour channels of the images.
        size: height and width of the images, in pixels.
        filters: width of every convolution.
        pool: 2×2 max-pooling instead of stride 2 (the mini-ImageNet network; about four times the work).
        norm: "batch" (see the normalisation policies), "layer" or "none".
        features: what the head reads: the mean over positions ("mean", as in the MAML paper's Omniglot code) or all of
            them ("flatten").
        context: size of a context vector that scales and shifts the channels of the third block (CAVIA); 0: none.
        transforms: a matrix after every convolution and after the head, which does not adapt (T-Net).
        warp: a further 3×3 convolution called `warp` at the end of every block, which starts as the identity (for WarpGrad).
    """
    if ways < 2 or channels < 1 or filters < 1:
        raise ValueError(f"conv4: ways={ways}, channels={channels}, filters={filters}: needs ways >= 2, the others >= 1.")
    _sized("conv4", context)
    _offered("conv4", "norm", norm, ("batch", "layer", "none"))
    _offered("conv4", "features", features, ("mean", "flatten"))
    smallest = 16 if pool else 1
    if size < smallest:
        raise ValueError(f"conv4: size={size} leaves no pixel after four halvings; images need >= {smallest} pixels.")
    # A bias before a batch norm cancels out; its gradient would be rounding noise, which Adam would amplify.
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    side, width = size, channels
    for i in range(4):
        side = side // 2 if pool else (side + 1) // 2
        block: list[nn.Module] = [nn.Conv2d(width, filters, 3, stride=1 if pool else 2, padding=1, bias=norm != "batch")]
        block += [Transform(filters)] if transforms else []
        shape = [filters, size >> i, size >> i] if pool else [filters, side, side]
        if norm == "batch":
            block.append(BatchNorm(filters))
        elif norm == "layer":
            block.append(LayerNorm(shape))
        block += [FiLM(filters, context)] if context and i == 2 else []
        block += [nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()]
        blocks[f"block{i}"] = nn.Sequential(*block)
        if warp:
            layer = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
            nn.init.dirac_(layer.weight)
            blocks[f"block{i}"].add_module("warp", layer)
        width = filters
    blocks["features"] = nn.Flatten() if features == "flatten" else SpatialMean()
    head = nn.Linear(filters * side * side if features == "flatten" else filters, ways)
    blocks["head"] = nn.Sequential(head, Transform(ways)) if transforms else head
    return nn.Sequential(blocks)


def _offered(model: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{model}: {name}={value!r} is not offered; choose one of {', '.join(choices)}.")


def _identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sized(model: str, context: int) -> None:
    if context < 0:
        raise ValueError(f"{model}: context={context}: it must be at least 0, the size of a vector.")


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "conv4": conv4}
