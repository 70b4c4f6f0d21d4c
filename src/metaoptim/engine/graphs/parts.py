"""One task's inner run: a learner as the engine hands it to an estimator, and the parts of the run as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.types import Batch, GradOp, Info, Learner, Meta, Params, State
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.graphs.trace import AnyStep
from metaoptim.nn import noise


@dataclass(frozen=True)
class Bound:
    """A learner in one task: it sees the weights that are not learnt beside those that are, so that no gradient is taken of
    them, and draws random numbers as a function of the task's key and of where in the run it stands.
    """

    learner: Learner
    fixed: Params
    key: Tensor

    @property
    def steps(self) -> int:
        return self.learner.steps

    def _all(self, meta: Meta) -> Meta:
        return Meta(self.fixed | meta.weights, meta.rule)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> State:
        with noise(self.key):
            return self.learner.init(self._all(meta), support, memory)

    def step(self, meta: Meta, state: State, support: Batch, k: int, grad: GradOp) -> State:
        with noise(self.key, 2 * _number(k) + 1):
            return self.learner.step(self._all(meta), state, support, k, grad)

    def loss(self, meta: Meta, state: State, batch: Batch, k: int) -> tuple[Tensor, Info]:
        with noise(self.key, 2 * _number(k) + 2):
            return self.learner.loss(self._all(meta), state, batch, k)

    def weights(self, meta: Meta, state: State) -> Params:
        return self.learner.weights(self._all(meta), state)

    def memory(self, state: State) -> State:
        return self.learner.memory(state)


def _number(k: Any) -> int:
    """The number of a step, or its symbol: what is drawn may depend on it."""
    return cast(int, k.number) if type(k) is AnyStep else cast(int, k)


@dataclass(frozen=True)
class Parts:
    """A `Run`: parts of an inner run as graphs, which all its steps share where they can.

    Called under `vmap`, a part is traced with the map inside, so that the graph holds the operators for all tasks at once.
    A tensor that comes in twice goes in once, and one that goes through comes out as the same object.
    """

    graphs: Graphs

    def __call__(self, part: Callable[..., Any], learner: Bound, k: int, *args: Any) -> Any:
        tensors: list[Tensor] = []
        structure = trees.take((learner.fixed, learner.key, args), tensors)
        inputs = list({id(x): x for x in tensors}.values())
        places = {id(x): i for i, x in enumerate(inputs)}
        call = _Call(self.graphs, part, learner, k, structure, [places[id(x)] for x in tensors])
        apply: Callable[..., tuple[Tensor, ...]] = _Across.apply
        outputs = iter(apply(call, *inputs))
        after, through = call.beside
        return trees.put(after, iter([next(outputs) if i is None else inputs[i] for i in through]))


@dataclass
class _Call:
    """A part at step k; its arguments have a structure around the inputs at the given places."""

    graphs: Graphs
    part: Callable[..., Any]
    learner: Bound
    k: int
    structure: Any
    places: list[int]
    beside: Any = None

    def run(self, axes: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The new tensors that the part returns, for every task, if an input has an axis of tasks."""
        device = inputs[0].device.type
        half = torch.is_autocast_enabled(device)

        def alone(k: int, *inputs: Tensor) -> tuple[Tensor, ...]:
            fixed, key, args = trees.put(self.structure, iter([inputs[i] for i in self.places]))
            with torch.autocast(device, torch.bfloat16, enabled=half):
                after = trees.take(self.part(replace(self.learner, fixed=fixed, key=key), k, *args), found := list[Tensor]())
            known = {id(x): i for i, x in enumerate(inputs)}
            self.beside = after, [known.get(id(x)) for x in found]
            return tuple(x for x in found if id(x) not in known)

        def function(k: int, *inputs: Tensor) -> tuple[Sequence[Tensor], Any]:
            if all(axis is None for axis in axes):
                return alone(k, *inputs), self.beside
            return vmap(partial(alone, k), tuple(axes), randomness="different")(*inputs), self.beside

        with torch.autocast(device, enabled=False):  # it is in the graph
            outputs, self.beside = self.graphs(
                (self.part, self.structure, tuple(self.places), tuple(axes), half), function, inputs, self.k
            )
        return tuple(outputs)


class _Across(torch.autograd.Function):
    """Takes a call through `vmap`, to where tensors have their axis of tasks."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        return call.run([None] * len(inputs), inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated through a part."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = call.run(in_dims[1:], inputs)
        return outputs, (0,) * len(outputs)
