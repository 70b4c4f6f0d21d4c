"""Runs the parts of an inner run, such as one step forward or back, as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.engine.bound import Bound
from metaoptim.engine.graphs.graphs import Graphs


@dataclass(frozen=True)
class Parts:
    """A `Call` that runs parts as graphs. All steps share one graph per part, because the step number is a tensor.

    Under `vmap`, a part is traced with the map inside, so that the graph holds the operators for all tasks at once.
    A tensor that is passed twice becomes one input; one that is passed through comes back as the same object.
    """

    graphs: Graphs

    def __call__(self, part: Callable[..., Any], learner: Bound, *args: Any) -> Any:
        tensors: list[Tensor] = []
        structure = trees.take((learner.fixed, learner.key, args), tensors)
        inputs = list({id(x): x for x in tensors}.values())
        places = {id(x): i for i, x in enumerate(inputs)}
        call = _Call(self.graphs, part, learner, structure, [places[id(x)] for x in tensors])
        apply: Callable[..., tuple[Tensor, ...]] = _Across.apply
        outputs = iter(apply(call, *inputs))
        after, through = call.beside
        return trees.put(after, iter([next(outputs) if i is None else inputs[i] for i in through]))


@dataclass
class _Call:
    """A part and its arguments: their structure, and for each tensor in it the index of its input."""

    graphs: Graphs
    part: Callable[..., Any]
    learner: Bound
    structure: Any
    places: list[int]
    beside: Any = None

    def run(self, axes: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The new tensors that the part returns; if an input has a task axis, those of every task."""
        device = inputs[0].device.type
        half = torch.is_autocast_enabled(device)

        def alone(*inputs: Tensor) -> tuple[Tensor, ...]:
            fixed, key, args = trees.put(self.structure, iter([inputs[i] for i in self.places]))
            with torch.autocast(device, torch.bfloat16, enabled=half):
                after = trees.take(self.part(replace(self.learner, fixed=fixed, key=key), *args), found := list[Tensor]())
            known = {id(x): i for i, x in enumerate(inputs)}
            self.beside = after, [known.get(id(x)) for x in found]
            return tuple(x for x in found if id(x) not in known)

        def function(*inputs: Tensor) -> tuple[Sequence[Tensor], Any]:
            if all(axis is None for axis in axes):
                return alone(*inputs), self.beside
            return vmap(alone, tuple(axes), randomness="different")(*inputs), self.beside

        with torch.autocast(device, enabled=False):  # its casts are traced into the graph
            name = (self.part, self.structure, tuple(self.places), tuple(axes), half)
            outputs, self.beside = self.graphs(name, function, inputs)
        return tuple(outputs)


class _Across(torch.autograd.Function):
    """Takes a call through `vmap`, to the level where tensors show their task axis."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        return call.run([None] * len(inputs), inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves nothing, because a part is never differentiated through."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = call.run(in_dims[1:], inputs)
        return outputs, (0,) * len(outputs)
