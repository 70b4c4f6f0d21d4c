"""A function of tensors as a graph of torch's operators, without what does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from metaoptim.engine.kernels import DECOMPOSITIONS

_aten = torch.ops.aten
_COPIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
_SAME_SHAPE = {_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.reshape.default}


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], share: bool = True) -> fx.GraphModule:
    """The operators that the function runs on such inputs, cleaned. A RuntimeError where values decide what it does.

    Tracing goes by shapes alone, which takes no memory to speak of; by values only where torch's rules for shapes fall short,
    as forward mode under vmap does in torch 2.13.
    """
    try:
        module = make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    except RuntimeError:
        module = make_fx(function, decomposition_table=DECOMPOSITIONS)(*inputs)
    clean(module, share)
    return module


def clean(module: fx.GraphModule, share: bool = True) -> None:
    """Takes out operators that return what they were given, that repeat another one, or whose result nobody reads.

    share: whether repetitions count; not so where a step is run again on purpose, to save the memory of its results.
    """
    graph = module.graph
    if any(_writes(node) for node in graph.nodes):
        return  # a value that changes in place can be neither shared nor left out
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = _unchanged(node)
        if source is None and share and not draws(node):
            source = seen.setdefault(_signature(node), node)
        if source is not None and source is not node:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or draws(node))
    module.recompile()


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _unchanged(node: fx.Node) -> fx.Node | None:
    """What a node returns as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in _COPIES:
        return source
    if node.target not in _SAME_SHAPE:
        return None
    before, after = source.meta["val"], node.meta["val"]
    return source if before.shape == after.shape and before.stride() == after.stride() else None


def _signature(node: fx.Node) -> Any:
    """Equal for nodes that compute the same."""
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)  # 1, 1.0 and True are not the same operand
