"""Large results are written into memory that a graph needs no longer, rather than into new memory.

Systems hand out large pieces of memory page by page at the first touch, which can take ten times as long as what is then computed
in them (docs/log.md). The numbers are the same to the bit, and no more memory is held than before at the peak.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

LARGE = 2**20  # bytes; what is smaller stays with the allocator and in the processor's cache

_ELEMENTWISE: dict[Any, Any] = {  # where an operand itself may be written into
    _aten.add.Tensor: _aten.add.out,
    _aten.sub.Tensor: _aten.sub.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.mul.Scalar: _aten.mul.out,
    _aten.div.Tensor: _aten.div.out,
    _aten.neg.default: _aten.neg.out,
    _aten.exp.default: _aten.exp.out,
    _aten.tanh.default: _aten.tanh.out,
    _aten.sigmoid.default: _aten.sigmoid.out,
    _aten.sqrt.default: _aten.sqrt.out,
    _aten.rsqrt.default: _aten.rsqrt.out,
    _aten.pow.Tensor_Scalar: _aten.pow.Tensor_Scalar_out,
    _aten.where.self: _aten.where.self_out,
    _aten.relu.default: _aten.clamp_min.out,
    _aten.threshold_backward.default: _aten.threshold_backward.grad_input,
}
_OTHERS: dict[Any, Any] = {
    _aten.mm.default: _aten.mm.out,
    _aten.bmm.default: _aten.bmm.out,
    _aten.gather.default: _aten.gather.out,
    _aten.max_pool2d_with_indices_backward.default: _aten.max_pool2d_with_indices_backward.grad_input,
    _aten.clone.default: _aten.copy_.default,
}
_KEYWORD = {_aten.threshold_backward.default: "grad_input", _aten.max_pool2d_with_indices_backward.default: "grad_input"}


@dataclass(eq=False)
class _Buffer:
    """Memory that a node makes: the node that stands for all of it, and the place of the last one that reads it."""

    node: fx.Node
    last: int

    @property
    def size(self) -> int:
        value: Tensor = self.node.meta["val"]
        return value.numel() * value.element_size()


def recycle(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with large buffers reused; `meta["val"]` of its nodes must be what tracing noted."""
    nodes = list(module.graph.nodes)
    targets = {node.target for node in nodes if node.op == "call_function"} - {getitem}
    if not all(isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable for target in targets):
        return module  # what lies in whose memory is not known
    found = _buffers(nodes)
    dying: dict[int, list[_Buffer]] = defaultdict(list)
    for buffer in set(found.values()):
        dying[buffer.last].append(buffer)
    room = _room(nodes, found)
    free: list[_Buffer] = []
    for now, node in enumerate(nodes):
        own = found.get(node)
        if own is not None and own.node is node and own.size >= LARGE and node.target in _ELEMENTWISE | _OTHERS:
            operand = _operand(node, found, now)
            if operand is not None:
                dying[now].remove(found[operand])
                own.node = _written(node, operand)
            elif (old := _first(free, own, room, now)) is not None:
                free.remove(old)
                for t in range(old.last + 1, now):
                    room[t] -= old.size
                own.node = _written(node, old.node)
            found[own.node] = own
        free += [buffer for buffer in dying[now] if buffer.size >= LARGE]
    module.recompile()
    return module


def _buffers(nodes: list[fx.Node]) -> dict[fx.Node, _Buffer]:
    """The buffer in which the value of a node lies, for those that the graph makes."""
    places = {node: i for i, node in enumerate(nodes)}
    found: dict[fx.Node, _Buffer] = {}
    for node in nodes:
        value, inputs = node.meta.get("val"), [found[x] for x in node.all_input_nodes if x in found]
        if node.op != "call_function":
            continue
        last = max([places[user] for user in node.users], default=places[node])
        if _is_view(node):
            for buffer in inputs:  # there is but one, as a rule
                buffer.last = max(buffer.last, last)
                found[node] = buffer
        elif isinstance(value, Tensor) and _dense(value):
            found[node] = _Buffer(node, last)
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether the value lies in the memory of an input."""
    source: Any = node.args[0] if node.target is getitem else node
    return source.target == _aten._unsafe_view.default or any(x.alias_info for x in source.target._schema.returns)


def _dense(value: Tensor) -> bool:
    """Whether the elements fill the memory from its start, in some order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return value.layout == torch.strided and value.storage_offset() == 0


def _room(nodes: list[fx.Node], found: dict[fx.Node, _Buffer]) -> list[int]:
    """Bytes that may be held at each node beside what it needs, without going above the peak."""
    live = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        buffer = found.get(node)
        if buffer is not None and buffer.node is node:
            live[i] += buffer.size
            live[buffer.last + 1] -= buffer.size
    for i in range(1, len(live)):
        live[i] += live[i - 1]
    return [max(live) - x for x in live]


def _operand(node: fx.Node, found: dict[fx.Node, _Buffer], now: int) -> fx.Node | None:
    """An operand that nobody reads afterwards, element for element where the result will be."""
    if node.target not in _ELEMENTWISE:
        return None
    for operand in node.all_input_nodes:
        buffer = found.get(operand)
        sharing = [x for x in node.all_input_nodes if buffer is not None and found.get(x) is buffer]
        if buffer is not None and buffer.last == now and buffer.size == found[node].size and all(_layout(x) == _layout(node) for x in sharing):
            return operand
    return None


def _first(free: list[_Buffer], own: _Buffer, room: list[int], now: int) -> _Buffer | None:
    """The buffer that was needed last among those of the right size that could be held until now."""
    value = own.node.meta["val"]
    for old in reversed(free):
        other = old.node.meta["val"]
        alike = (other.numel(), other.dtype, other.device) == (value.numel(), value.dtype, value.device)
        if alike and all(room[t] >= old.size for t in range(old.last + 1, now)):
            return old
    return None


def _written(node: fx.Node, into: fx.Node) -> fx.Node:
    """The operator again, in the form that writes its result into the memory of another node."""
    graph, value = node.graph, node.meta["val"]
    with graph.inserting_before(node):
        if _layout(into) != _layout(node):
            into = graph.call_function(_aten.as_strided.default, (into, list(value.shape), list(value.stride())))
        target = (_ELEMENTWISE | _OTHERS)[node.target]
        if target is _aten.copy_.default:
            new = graph.call_function(target, (into, node.args[0]))
        else:
            args = (*node.args, 0) if target is _aten.clamp_min.out else node.args
            new = graph.call_function(target, args, node.kwargs | {_KEYWORD.get(node.target, "out"): into})
    new.meta["val"] = value
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _layout(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype, value.device
