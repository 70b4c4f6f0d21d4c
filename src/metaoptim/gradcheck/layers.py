"""The layers of a module with what they are really given: which is the smallest one that is off?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaoptim.core import trees
from metaoptim.core.types import Batch, Params
from metaoptim.gradcheck.differences import seeded
from metaoptim.gradcheck.parts import INPUT, Function, Part, draws, fault, floats, names_of, snapshot
from metaoptim.learners import Network
from metaoptim.nn import held, written_out
from metaoptim.nn.layers import named

MANY = 3  # layers that are named at most


class Layer(NamedTuple):
    """A module, with the weights that it has and the arguments that it was first called with."""

    path: str
    module: nn.Module
    weights: Params
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    engines: bool = True
    """Whether it runs as in the engine, and not as it is."""

    @property
    def name(self) -> str:
        return named(self.path, self.module)

    def part(self) -> Part:
        return Part(self.name, lambda: self.function(copy.deepcopy(self.module)), self.weights | self.inputs())

    def inputs(self) -> Params:
        """The arguments that a slope can be taken in."""
        leaves = enumerate(trees.flatten(self.arguments))
        return {f"{INPUT}{i}": x for i, x in leaves if isinstance(x, Tensor) and x.is_floating_point()}

    def function(self, module: nn.Module) -> Function:
        def call(at: Params) -> Any:
            # A copy, for a layer that writes into what it is given, such as ReLU(inplace=True).
            given = [at[n].clone() if (n := f"{INPUT}{i}") in at else x for i, x in enumerate(trees.flatten(self.arguments))]
            args, kwargs = trees.unflatten(given, self.arguments)
            constant = {n: torch.where(fixed, self.weights[n], at[n]) for n, fixed in held(module).items()}
            with written_out(self.engines):
                return functional_call(module, {n: at[n] for n in self.weights} | constant, args, kwargs)

        return call


def layers(network: Network, weights: Params, batch: Batch, engines: bool = True) -> list[Layer]:
    """The layers that a forward pass calls, those inside others first, and the network's output last of all."""
    net, found, open_ = copy.deepcopy(network.net), list[Layer](), dict[str, Any]()

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            open_.setdefault(path, trees.map_tensors(snapshot, (args, kwargs)))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if all(path != layer.path for layer in found):
                clean = network.net.get_submodule(path)
                own = {n: weights.get(f"{path}.{n}" if path else n, p.detach()) for n, p in clean.named_parameters()}
                found.append(Layer(path, clean, own, open_[path], engines))

        return hook

    for path, module in net.named_modules():
        module.register_forward_pre_hook(before(path), with_kwargs=True)
        module.register_forward_hook(after(path))
    with torch.no_grad(), written_out(), suppress(RuntimeError):  # for a layer that breaks down on what another one returns
        functional_call(net, trees.map_tensors(torch.clone, weights), (batch[0],))
    return found


def culprits(network: Network, weights: Params, batch: Batch, *, twice: bool, mapped: bool, outside: bool) -> list[str]:
    """A sentence for each smallest part that is off while all parts inside it are right.

    twice: whether second derivatives matter; mapped: whether vmap does; outside: whether a gradient taken outside of it does.
    """
    sentences: list[str] = []
    blamed: list[str] = []
    x, y = batch
    with seeded(trees.device(x)):
        seen = layers(network, weights, batch, engines=not outside)
    for layer in seen:
        if any(path == layer.path or path.startswith(f"{layer.path}." if layer.path else "") for path in blamed):
            continue
        reason = unfit(layer) or fault(layer.part(), twice=twice, mapped=mapped, outside=outside)
        if reason:
            blamed.append(layer.path)
            sentences.append(f"{layer.name}: {reason}.")
        if len(blamed) == MANY:
            break
    if not blamed and seen and not seen[-1].path:
        output = seen[-1].function(copy.deepcopy(seen[-1].module))(seen[-1].part().at)
        given = {n: x.detach() for n, x in floats(output).items()}
        name = getattr(network.loss, "__name__", type(network.loss).__name__)
        loss = Part(f"the loss `{name}`", lambda: lambda at: network.loss(_filled(output, at), y), given)
        if reason := fault(loss, twice=twice):
            sentences.append(f"{loss.name}: {reason}.")
    return sentences


def _filled(output: Any, at: Params) -> Any:
    """An output with these floats in it, by the numbers that `floats` gives them."""
    return trees.unflatten([at.get(str(i), x) for i, x in enumerate(trees.flatten(output))], output)


def unfit(layer: Layer) -> str | None:
    """Why a layer is no function of its weights and inputs."""
    module, at = copy.deepcopy(layer.module), layer.part().at
    before, kept = _state(module), trees.map_tensors(torch.clone, layer.weights)
    call = layer.function(module)
    with torch.no_grad():
        runs = []
        for function in (call, call, layer.part().fresh()):
            with draws(at):
                runs.append(trees.map_tensors(snapshot, function(at)))
    if written := [n for n, x in layer.weights.items() if not _same(x, kept[n])]:
        return f"a forward pass writes into its own {names_of(written)}; leave weights to the optimizer"
    if {x.dtype for x in at.values()} == {torch.float64} != {x.dtype for x in floats(runs[0]).values()}:
        return "it returns other floats than it is given (a cast to a fixed type?), so that it can't be checked in float64"
    first, second, other = (floats(run) for run in runs)
    if all(_same(x, second[n]) for n, x in first.items()):
        return None
    if not all(_same(x, other[n]) for n, x in first.items()):
        return (
            "two calls with the same torch seed differ, in a fresh copy too: it draws random numbers of its own (numpy, "
            "random), or reads something global; draw them with torch"
        )
    after = _state(module)
    changed = [n for n, x in before.items() if not _same(x, after[n])]
    return (
        f"its output changes from call to call, as {names_of(changed) if changed else 'a state'} that forward writes does; a "
        "forward pass must be a function of weights and inputs: take the state out of it"
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """Buffers and plain attributes of a module and those inside it, copied."""
    found: dict[str, Any] = dict(module.named_buffers())
    for path, part in module.named_modules():
        own = {n: x for n, x in vars(part).items() if n not in _INTERNAL and isinstance(x, Tensor | int | float | list)}
        found |= {f"{path}.{n}" if path else n: x for n, x in own.items()}
    return copy.deepcopy(found)


_INTERNAL = set(vars(nn.Module()))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=0.0, equal_nan=True)
    return bool(a == b)
