"""Memory planning for traced graphs: large results go into memory that is dead, or that an earlier graph left behind.

When a large block is freed, glibc returns it to the system, which hands it out again page by page at the first touch. That can
take ten times as long as the arithmetic that follows (docs/log.md, docs/decisions/0017). Results stay the same to the bit.
Devices for which torch has an allocator of its own need none of this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.engine.graphs.trace import is_view, layout, writes

_aten = torch.ops.aten

LARGE = 2**20  # bytes; smaller results stay with the allocator and in the processor's cache

_ELEMENTWISE: dict[Any, Any] = {  # the result may overwrite an operand
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
_OTHERS: dict[Any, Any] = {  # the result may go into a given buffer, but not over an operand
    _aten.mm.default: _aten.mm.out,
    _aten.bmm.default: _aten.bmm.out,
    _aten.gather.default: _aten.gather.out,
    _aten.max_pool2d_with_indices_backward.default: _aten.max_pool2d_with_indices_backward.grad_input,
    _aten.clone.default: _aten.copy_.default,
}
_INTO = _ELEMENTWISE | _OTHERS


Kind = tuple[int, torch.dtype, torch.device]
"""What makes two pieces of memory interchangeable: number of elements, dtype, device."""


class Scratch:
    """Memory that graphs pass on to each other; several threads may share it."""

    def __init__(self) -> None:
        self.free: dict[Kind, list[Tensor]] = defaultdict(list)

    @contextmanager
    def lent(self, kinds: Sequence[Kind]) -> Iterator[list[Tensor]]:
        """Lends one piece of memory of each kind, its contents undefined."""
        pieces = [self._piece(*kind) for kind in kinds]
        try:
            yield pieces
        finally:
            for kind, piece in zip(kinds, pieces, strict=True):
                self.free[kind].append(piece)

    def give_back(self) -> None:
        """Drops the pieces that are not lent out."""
        self.free.clear()

    def _piece(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            return self.free[count, dtype, device].pop()
        except IndexError:
            return torch.empty(count, dtype=dtype, device=device)


@dataclass(eq=False)
class _Buffer:
    """Memory that a node makes: the node that stands for all of it, and the position of the last node that reads it."""

    node: fx.Node
    last: int
    lent: bool = False


def recycle(module: fx.GraphModule, results: bool = True) -> list[Kind]:
    """Makes a graph reuse large buffers; returns the kinds of the scratch pieces that it now takes as its last inputs.

    `meta["val"]` of its nodes must be what tracing recorded. results: whether what it returns may lie in such pieces too.
    """
    nodes = list(module.graph.nodes)
    kept = set() if results else set(nodes[-1].all_input_nodes)
    targets = {node.target for node in nodes if node.op == "call_function"} - {getitem}
    known = all(isinstance(target, torch._ops.OpOverload) for target in targets) and not any(writes(node) for node in nodes)
    # With a write, or an operator of undeclared aliasing, any value may lie in any memory: then the graph is left as it is.
    found = _buffers(nodes) if known else {}
    inputs = [node for node in nodes if node.op == "placeholder"]
    kinds: list[Kind] = []
    free: dict[Kind, list[fx.Node]] = defaultdict(list)
    dying: dict[int, list[_Buffer]] = defaultdict(list)
    for buffer in set(found.values()):
        dying[buffer.last].append(buffer)
    for now, node in enumerate(nodes):
        own = found.get(node)
        if own is not None and own.node is node and node not in kept and _can_write(node):
            if (operand := _operand(node, found, now)) is not None:
                old = found[operand]  # if its memory is a lent piece, the result takes the piece over
                own.lent, old.lent = old.lent, False
            else:
                if not free[_kind(node)]:  # as many pieces as are in use at once, and no more
                    with module.graph.inserting_after(*inputs[-1:]):
                        inputs.append(module.graph.placeholder(f"piece_{len(kinds)}"))
                    free[_kind(node)].append(inputs[-1])
                    kinds.append(_kind(node))
                operand, own.lent = free[_kind(node)].pop(), True
            own.node = _written(node, operand)
            found[own.node] = own
        for buffer in dying[now]:
            if buffer.lent:  # pieces alone are reused; other memory goes back to the allocator
                free[_kind(buffer.node)].append(buffer.node)
    module.recompile()
    return kinds


def _can_write(node: fx.Node) -> bool:
    """Whether an operator can be told where to write its result, and whether that pays."""
    on_cpu = node.meta["val"].device.type == "cpu"
    return on_cpu and _bytes(node) >= LARGE and node.target in _INTO


def _bytes(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _kind(node: fx.Node) -> Kind:
    value: Tensor = node.meta["val"]
    return value.numel(), value.dtype, value.device


def _buffers(nodes: list[fx.Node]) -> dict[fx.Node, _Buffer]:
    """Maps each node to the buffer that holds its value, for the buffers that the graph makes itself."""
    places = {node: i for i, node in enumerate(nodes)}
    found: dict[fx.Node, _Buffer] = {}
    for node in nodes:
        value, inputs = node.meta.get("val"), [found[x] for x in node.all_input_nodes if x in found]
        if node.op != "call_function":
            continue
        last = max([places[user] for user in node.users], default=places[node])
        if is_view(node):
            for buffer in inputs:  # usually just one; while a view is alive, so is its buffer
                buffer.last = max(buffer.last, last)
                found[node] = buffer
        elif isinstance(value, Tensor) and _dense(value):
            found[node] = _Buffer(node, last)
    return found


def _dense(value: Tensor) -> bool:
    """Whether the elements fill the memory from its start without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return value.layout == torch.strided and value.storage_offset() == 0


def _operand(node: fx.Node, found: dict[fx.Node, _Buffer], now: int) -> fx.Node | None:
    """An operand that is not read afterwards, and that has each element where the result will have it."""
    for operand in node.all_input_nodes if node.target in _ELEMENTWISE else []:
        buffer = found.get(operand)
        if buffer is not None and buffer.last == now and _bytes(buffer.node) == _bytes(node):
            sharing = [x for x in node.all_input_nodes if found.get(x) is buffer]
            # Through a view of another layout, an element could be overwritten before it is read.
            if all(layout(x) == layout(node) for x in sharing):
                return operand
    return None


def _written(node: fx.Node, into: fx.Node) -> fx.Node:
    """Replaces the operator by its `out` variant, which writes the result into another node's memory."""
    graph, value = node.graph, node.meta["val"]
    with graph.inserting_before(node):
        if into.meta.get("val") is None or layout(into) != layout(node):
            into = graph.call_function(_aten.as_strided.default, (into, list(value.shape), list(value.stride())))
        target = _INTO[node.target]
        if target is _aten.copy_.default:
            new = graph.call_function(target, (into, node.args[0]))
        else:
            args = (*node.args, 0) if target is _aten.clamp_min.out else node.args
            keyword = next(x.name for x in target._schema.arguments if x.is_out)
            new = graph.call_function(target, args, node.kwargs | {keyword: into})
    new.meta["val"] = value
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
