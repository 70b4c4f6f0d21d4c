"""A graph as one node of another, so that what many steps do is traced and compiled once.

Tracing sees an operator that takes the graph's number; in the outer graph, once it is traced, the graph itself takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from metaoptim.engine.graphs.trace import draws, is_view, trace, writes

_NUMBERS = count()


class Node:
    """A traced function of contiguous tensors, whose results are contiguous, each in memory of its own.

    run: computes them; ready: whether that is as quick as it will be.

    Args:
        function, inputs: what is traced, and what its inputs are like.
        compiled: whether Inductor will compile the graph, and may give results another order of axes than tracing saw.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], compiled: bool) -> None:
        with _disable_current_modes():  # of the trace that this is inside of
            self.inputs = [torch.ones(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
            self.module = trace(function, self.inputs)
        if any(draws(node) or writes(node) for node in self.module.graph.nodes):
            raise ValueError("only what neither draws nor writes can be a node.")
        self.results = _own(self.module, compiled)
        self.run: Callable[..., Sequence[Tensor]] = self.module.forward
        self.ready = False
        self.number = next(_NUMBERS)
        _NODES[self.number] = self

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results in the trace of another graph."""
        found: list[Tensor] = torch.ops.metaoptim.node(list(inputs), self.number)
        return found


_NODES: WeakValueDictionary[int, Node] = WeakValueDictionary()


@torch.library.custom_op("metaoptim::node", mutates_args=())
def _node(inputs: list[Tensor], number: int) -> list[Tensor]:
    """What stands for a node in a trace."""
    return list(_NODES[number].run(*inputs))


@_node.register_fake
def _(inputs: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in _NODES[number].results]


def inside() -> bool:
    """Whether a graph is being traced."""
    return get_proxy_mode() is not None


def nodes_of(module: fx.GraphModule) -> list[Node]:
    """The nodes that a graph has, each of them once."""
    return list({number: _NODES[number] for _, number in _calls(module).values()}.values())


def called(module: fx.GraphModule) -> None:
    """Has a graph call its nodes, in place of the operator that stood for them."""
    for node, (inputs, number) in _calls(module).items():
        node.target, node.args = _function(_NODES[number].run, number), tuple(inputs)
    module.recompile()


def _calls(module: fx.GraphModule) -> dict[fx.Node, Any]:
    return {node: node.args for node in module.graph.nodes if node.target is torch.ops.metaoptim.node.default}


def _function(run: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Something with a name of its own, by which the code of a graph can call it."""

    def node(*inputs: Tensor) -> Any:
        return run(*inputs)

    node.__name__ = f"node_{number}"
    return node


def _own(module: fx.GraphModule, always: bool) -> list[Any]:
    """Copies results to where they are wanted, those that aren't there or all; shapes, dtypes and devices of them.

    Inductor writes them there at once.
    """
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    results: list[fx.Node] = []
    for x in end.args[0]:
        value: Tensor = x.meta["val"]
        if always or x in results or x.op != "call_function" or is_view(x) or not value.is_contiguous():
            with module.graph.inserting_before(end):
                x = module.graph.call_function(torch.ops.aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
            x.meta["val"] = value.new_empty(value.shape)
        results.append(x)
    end.args = (results,)
    module.recompile()
    return [(value.shape, value.dtype, value.device) for value in (x.meta["val"] for x in results)]
