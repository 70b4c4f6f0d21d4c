"""A family of training problems from a module, a loss and examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.random import forked
from metaoptim.core.types import Batch, Info, Params
from metaoptim.learners import Network
from metaoptim.lopt.data import Data, check_examples, minibatches
from metaoptim.lopt.look import look
from metaoptim.lopt.problem import Problems
from metaoptim.nn.layers import BATCH_NORMS, named

STARTS = 8  # whose mean loss is a unit


def from_module(
    net: nn.Module | Callable[[], nn.Module],
    loss: Callable[[Any, Any], Tensor],
    data: Data | tuple[Any, Any],
    batch: int = 64,
    steps: int = 100,
    unit: float | None = None,
    name: str | None = None,
) -> Problems:
    """A family of your own: a module that is trained from new starts, on minibatches of examples.

    A start is a function of the seed: each layer's `reset_parameters`, or the function that builds the module, under torch's
    generator with that seed. Minibatches are drawn with replacement. Weights with requires_grad=False stay as they are.

    Args:
        net: the module, which stays as it is, or a function without arguments that builds one.
        loss: loss(output, target) -> scalar, the mean over examples.
        data: inputs and targets (x, y) [N, …], or `Data`.
        batch: examples B of a minibatch.
        steps: inner steps K of a run.
        unit: the loss of knowing nothing, by which judged losses are divided; none: the mean loss of a few starts.
        name: of the family; none: the module's class and the data's name.

    Raises:
        ValueError: a module, a loss or data that can't be trained with each other, or a layer that can't be drawn anew.
    """
    check_counts(batch=batch, steps=steps)
    check_positive(unit=unit)
    start = partial(_redrawn, net) if isinstance(net, nn.Module) else partial(_built, net)
    own = net if isinstance(net, nn.Module) else _module(net, 0)
    if not any(p.requires_grad for p in own.parameters()):
        raise ValueError(f"net={type(own).__name__} has no weights with requires_grad=True, so there is nothing to train.")
    _check_layers(own, redrawn=own is net)
    drawn, known = _drawn(data)
    called = "-".join([type(own).__name__, *([known["data"]] if "data" in known else [])])
    options = {"batch": batch, **known}
    family = Problems(name or called, start, partial(drawn, batch), LossOf(Network(own, loss)), steps=steps, options=options)
    look(family, 0)
    if unit is not None:
        return family.with_(unit=unit)
    found = sum(_begun(family, seed) for seed in range(STARTS)) / STARTS
    if not 0 < found < math.inf:
        raise ValueError(f"the loss at a start is {found:.3g}, which is no unit to divide by: give unit=, a positive number.")
    return family.with_(unit=float(f"{found:.2g}"))


@dataclass(frozen=True)
class LossOf:
    """The loss of a network's output on a minibatch (x, y), as a function of its weights."""

    network: Network

    def __call__(self, weights: Params, minibatch: Batch) -> tuple[Tensor, Info]:
        x, y = minibatch
        return self.network.mean_loss(self.network.output(weights, x, None), y), {}


def _drawn(data: Any) -> tuple[Callable[..., Batch], dict[str, Any]]:
    """How minibatches of a size are drawn, and what is known of the examples."""
    if isinstance(data, Data):
        return data.batches, {"examples": len(data.x), "data": data.name}
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(f"data must be a pair of tensors (x, y), or mo.lopt.Data; found {brief(data)}.")
    check_examples(*data)
    return partial(minibatches, tuple(data)), {"examples": len(trees.flatten(data)[0])}


def _begun(family: Problems, seed: int) -> float:
    """The loss of a problem at its start."""
    with forked(torch.get_default_device(), seed), torch.no_grad():
        return family.loss(family.start(seed), trees.index(family.batches(seed, "query", 0, 1), 0))[0].item()


def _redrawn(net: nn.Module, seed: int) -> Params:
    """The weights of a copy whose layers have begun anew."""
    fresh = copy.deepcopy(net)
    with forked(torch.get_default_device(), seed):
        for layer in reversed(list(fresh.modules())):  # so that a module has the last word over its parts
            if callable(again := getattr(layer, "reset_parameters", None)):
                again()
    return _weights(fresh)


def _built(build: Callable[[], nn.Module], seed: int) -> Params:
    return _weights(_module(build, seed))


def _module(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What a function builds under that seed."""
    try:
        with forked(torch.get_default_device(), seed):
            found: Any = build() if callable(build) else build
    except TypeError as error:
        raise ValueError(f"net={brief(build)} can't be called without arguments ({error}): give lambda: Net(…).") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"net={brief(found)}: it must be a module, or a function without arguments that builds one.")
    return found


def _weights(net: nn.Module) -> Params:
    return {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}


def _check_layers(net: nn.Module, redrawn: bool) -> None:
    """A ValueError for a layer that keeps statistics of a run, or that can't be drawn anew where it must."""
    for name, layer in net.named_modules():
        if isinstance(layer, BATCH_NORMS) and layer.track_running_stats:
            raise ValueError(
                f"{named(name, layer)} keeps running statistics, which are no weights of a run: give mo.nn.convert(net), whose "
                "batch norms use those of each minibatch."
            )
        own = [n for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
        if redrawn and own and not callable(getattr(layer, "reset_parameters", None)):
            raise ValueError(
                f"{named(name, layer)} has weights (`{own[0]}`) and no reset_parameters, by which a problem would begin anew: "
                "give a function that builds the module, such as lambda: Net()."
            )
