"""A function of tensors as a graph of torch's operators, without what does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from metaoptim.engine.graphs.convolutions import DECOMPOSITIONS

_aten = torch.ops.aten
_COPIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
_SAME_LAYOUT = {
    *(_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.reshape.default),
    *(_aten._to_copy.default, _aten.clone.default),
}
_ZEROS = {
    *(_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten._efficientzerotensor.default),
    _aten._new_zeros_with_same_feature_meta.default,
}
_LINEAR = {  # in their first argument
    *(_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.permute.default, _aten.t.default),
    *(_aten._to_copy.default, _aten.clone.default, _aten.neg.default, _aten.sum.dim_IntList, _aten.mul.Scalar),
}
_RETURNING = {  # for what writes into its first argument: torch does in forward mode, into what it has just made
    _aten.copy_.default: _aten.copy.default,
    _aten.div_.Tensor: _aten.div.Tensor,
    _aten.relu_.default: _aten.relu.default,
}

Mode = Literal["real", "fake"]
Kernels = dict[Any, Callable[..., Any]]

_MANNERS: Sequence[tuple[Mode, Kernels]] = (("fake", DECOMPOSITIONS), ("real", DECOMPOSITIONS), ("fake", {}), ("real", {}))


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operators that the function runs on such inputs, cleaned. A RuntimeError where values decide what it does.

    Tracing goes by shapes alone, which takes no memory to speak of; by values only where torch's rules for shapes fall short,
    as forward mode under vmap does in torch 2.13. Convolutions of our own return another layout than torch's; where the
    function asks for torch's, as `view` can, it has its own.
    """
    for mode, kernels in _MANNERS[:-1]:
        with suppress(Exception):  # whatever torch can say; a fault of the function itself comes up once more below
            return _traced(function, inputs, mode, kernels)
    return _traced(function, inputs, *_MANNERS[-1])


def _traced(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], mode: Mode, kernels: Kernels
) -> fx.GraphModule:
    def made(function: Callable[..., Any]) -> fx.GraphModule:  # from tensors beside the inputs too, such as a module's buffers
        return make_fx(function, decomposition_table=kernels, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)

    module = made(function)
    for node in module.graph.nodes:
        _return(node)
    if any(writes(node) for node in module.graph.nodes):
        module = made(functionalize(module))
    clean(module)
    if mode == "fake" and not any(writes(node) for node in module.graph.nodes):
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            _Trial(module).run(*inputs)
    return module


class _Trial(fx.Interpreter):
    """Raises a RuntimeError where an operator's result has other strides than its rule for shapes foretold.

    A few of torch's rules are wrong about them, and what comes later may count on them: a view, or our convolutions.
    """

    def run_node(self, n: fx.Node) -> Any:
        found, foretold = fx.Interpreter.run_node(self, n), n.meta.get("val")
        if isinstance(found, Tensor) and isinstance(foretold, Tensor) and found.numel():
            pairs = zip(found.stride(), foretold.stride(), found.shape, strict=True)
            if any(a != b and size > 1 for a, b, size in pairs):
                raise RuntimeError(f"{n.target} returns strides {found.stride()}; foretold were {foretold.stride()}.")
        return found


def _return(node: fx.Node) -> None:
    """Has an operator return its result that writes it into a value of the graph which nobody else knows."""
    if node.target in _RETURNING:
        into: Any = node.args[0]
        if isinstance(into.target, torch._ops.OpOverload) and len(into.users) == 1 and not is_view(into):
            node.target = _RETURNING[node.target]


def is_view(node: fx.Node) -> bool:
    """Whether the value lies in the memory of an input."""
    source: Any = node
    while source.target is getitem:
        source = source.args[0]
    return source.target == _aten._unsafe_view.default or any(x.alias_info for x in source.target._schema.returns)


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Takes out operators that return what they were given, that repeat another one, or whose result nobody reads.

    Forward mode makes many zeros, which are neither multiplied nor added.
    """
    graph = module.graph
    if any(writes(node) for node in graph.nodes):
        return module  # a value that changes in place can be neither shared nor left out
    seen: dict[Any, fx.Node] = {}
    zeros: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_zero(node, zeros):
            zeros.add(node)
        source = _unchanged(node, zeros)
        if source is None and not draws(node):
            source = seen.setdefault(_signature(node), node)
        if source is not None and source is not node:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or draws(node))
    module.recompile()
    return module


def bare(module: fx.GraphModule) -> fx.GraphModule:
    """Without what tracing noted of every value, which is more than the graph itself."""
    for node in module.graph.nodes:
        node.meta.clear()
    return module


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def writes(node: fx.Node) -> bool:
    """Whether an operator changes a tensor that it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Whether every element is 0 whatever the inputs are (finite, that is)."""
    if node.target == _aten.mul.Tensor:
        return any(x in zeros for x in node.args)
    return node.target in _ZEROS or (node.target in _LINEAR and node.args[0] in zeros)


def _unchanged(node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """What a node returns as it is."""
    if node.target == _aten.add.Tensor:
        left = [x for x in node.args if x not in zeros]
        source = left[0] if len(left) == 1 and not node.kwargs else None
    elif node.target == _aten.copy.default:
        source = node.args[1]
    elif node.target == _aten.pow.Tensor_Scalar:
        source = node.args[0] if node.args[1] == 1 else None
    else:
        source = node.args[0] if node.args and node.target in _COPIES | _SAME_LAYOUT else None
    if not isinstance(source, fx.Node):
        return None
    return source if node.target in _COPIES or layout(source) == layout(node) else None


def layout(node: fx.Node) -> Any:
    """Shape, strides, type and device of the value."""
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype, value.device


def _signature(node: fx.Node) -> Any:
    """Equal for nodes that compute the same."""
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)  # 1, 1.0 and True are not the same operand
