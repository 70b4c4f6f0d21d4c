"""Traces a function of tensors into a graph of torch's operators, and removes those that do nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from metaoptim.engine.graphs.convolutions import DECOMPOSITIONS

_aten = torch.ops.aten
_LIFTS = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
_COPIES = {_aten.detach.default, _aten.alias.default, *_LIFTS}
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
_RETURNING = {  # for operators that write into their first argument; torch's forward mode does so, into tensors just made
    _aten.copy_.default: _aten.copy.default,
    _aten.div_.Tensor: _aten.div.Tensor,
    _aten.relu_.default: _aten.relu.default,
}

FEW = 64  # numbers of a constant that is looked for again

Mode = Literal["real", "fake"]
Kernels = dict[Any, Callable[..., Any]]

_MANNERS: Sequence[tuple[Mode, Kernels]] = (("fake", DECOMPOSITIONS), ("real", DECOMPOSITIONS), ("fake", {}), ("real", {}))


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operators that the function runs on such inputs, cleaned up. RuntimeError if the function branches on values.

    Tracing goes by shapes alone, which takes hardly any memory. It goes by values only where torch's shape rules fall short,
    as they do for forward mode under vmap in torch 2.13. Our own convolutions return another layout than torch's. A function
    that relies on torch's layout, as `view` can, is traced with torch's convolutions.
    """
    with silenced("torch._subclasses.fake_tensor"):  # it logs tracebacks of what is raised anyway
        for mode, kernels in _MANNERS[:-1]:
            with suppress(Exception):  # torch can raise anything; an error of the function itself is raised once more below
                return _traced(function, inputs, mode, kernels)
        return _traced(function, inputs, *_MANNERS[-1])


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """One of torch's loggers says nothing."""
    loud = logging.getLogger(name)
    before, loud.disabled = loud.disabled, True
    try:
        yield
    finally:
        loud.disabled = before


def _traced(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], mode: Mode, kernels: Kernels
) -> fx.GraphModule:
    def made(function: Callable[..., Any]) -> fx.GraphModule:  # tensors besides the inputs are allowed: a module's buffers
        return make_fx(function, decomposition_table=kernels, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)

    module = made(function)
    for node in module.graph.nodes:
        _return(node)
    if any(writes(node) for node in module.graph.nodes):  # `clean` can't touch a graph that writes
        module = made(functionalize(module))
    clean(module)
    # What shapes predicted is checked by one real run. A graph that still writes is not tried, because trying it would write.
    if mode == "fake" and not any(writes(node) for node in module.graph.nodes):
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            _Trial(module).run(*inputs)
    return module


class _Trial(fx.Interpreter):
    """Runs a graph; RuntimeError where a result has other strides than the operator's shape rule predicted.

    A few of torch's rules get strides wrong, and later nodes may rely on them: a view, or our convolutions. A `reshape` traced
    as a view would then fail, and an `as_strided` would silently read other numbers (docs/decisions/0018).
    """

    def run_node(self, n: fx.Node) -> Any:
        found, foretold = fx.Interpreter.run_node(self, n), n.meta.get("val")
        if isinstance(found, Tensor) and isinstance(foretold, Tensor) and found.numel():
            pairs = zip(found.stride(), foretold.stride(), found.shape, strict=True)
            if any(a != b and size > 1 for a, b, size in pairs):
                raise RuntimeError(f"{n.target} returns strides {found.stride()}; foretold were {foretold.stride()}.")
        return found


def _return(node: fx.Node) -> None:
    """Makes an in-place operator return its result instead, if nothing else uses the value that it overwrites."""
    if node.target in _RETURNING:
        into: Any = node.args[0]
        if isinstance(into.target, torch._ops.OpOverload) and len(into.users) == 1 and not is_view(into):
            node.target = _RETURNING[node.target]


def is_view(node: fx.Node) -> bool:
    """Whether the value shares memory with an input of its operator."""
    source: Any = node
    while source.target is getitem:
        source = source.args[0]
    return source.target == _aten._unsafe_view.default or any(x.alias_info for x in source.target._schema.returns)


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Removes operators that return their input unchanged, common subexpressions, and dead code.

    Forward mode makes many zero tensors; multiplying and adding those goes too.
    """
    graph = module.graph
    if any(writes(node) for node in graph.nodes):
        return module  # a value that is changed in place can be neither shared nor dropped
    seen: dict[Any, fx.Node] = {}
    zeros: set[fx.Node] = set()
    for node in list(graph.nodes):
        source: fx.Node | None = None
        if node.op == "get_attr":
            source = seen.setdefault(_constant(module, node), node)
        elif node.op == "call_function":
            _view_at_once(node)
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
    """Removes what tracing recorded about every value, which takes more memory than the graph itself."""
    for node in module.graph.nodes:
        node.meta.clear()
    return module


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def writes(node: fx.Node) -> bool:
    """Whether an operator mutates one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _view_at_once(node: fx.Node) -> None:
    """Makes a view of a view one view of what was viewed first, where it can: `vmap` makes chains of them."""
    value, source = node.meta.get("val"), node
    while source.op == "call_function" and _same_numbers(source) and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        found = source.meta.get("val")
        if isinstance(value, Tensor) and isinstance(found, Tensor):
            with suppress(RuntimeError, ValueError):  # its strides forbid it
                if _place(found.view(value.shape)) == _place(value):
                    node.target, node.args, node.kwargs = _aten.view.default, (source, list(value.shape)), {}


def _same_numbers(node: fx.Node) -> bool:
    """Whether it is a view that shows what is in memory, and not its conjugate or negative: values in a trace don't tell."""
    return is_view(node) and node.target not in (_aten._conj.default, _aten._neg_view.default)


def _place(value: Tensor) -> Any:
    """What a view shows of a tensor's memory, and how."""
    return value.shape, value.stride(), value.storage_offset(), value.dtype


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Whether every element is 0, whatever the inputs are (as long as they are finite)."""
    if node.target == _aten.mul.Tensor:
        return any(x in zeros for x in node.args)
    return node.target in _ZEROS or (node.target in _LINEAR and node.args[0] in zeros)


def _unchanged(node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """The input that a node returns unchanged, if there is one."""
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
    """Shape, strides, dtype and device of the value."""
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype, value.device


def _signature(node: fx.Node) -> Any:
    """Equal for nodes that compute the same value."""
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _constant(module: fx.GraphModule, node: fx.Node) -> Any:
    """Equal for equal constants that the function makes, as `torch.tensor(…)` does anew in every step."""
    value = getattr(module, str(node.target), None)
    made = all(user.target in _LIFTS for user in node.users)  # other tensors are somebody's, who may write into them
    if not made or not isinstance(value, Tensor) or value.numel() > FEW:
        return node
    return value.dtype, value.device, value.shape, value.stride(), str(value.tolist())


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)  # 1, 1.0 and True are not the same operand
