"""Graphs that write into memory which they need no longer: the same numbers, no more memory, nobody else's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from metaoptim.engine import buffers
from metaoptim.engine.graph import trace

Function = Callable[..., Sequence[Tensor]]


pytestmark = pytest.mark.usefixtures("reused_buffers")

def both(function: Function, *inputs: Tensor) -> fx.GraphModule:
    """The graph with its buffers reused, after it was seen to give what it gives without, twice."""
    plain, module = trace(function, inputs), buffers.recycle(trace(function, inputs))
    kept = [x.clone() for x in inputs]
    for _ in range(2):
        for a, b in zip(module(*inputs), plain(*inputs), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "an input was written into"
    return module


def reused(function: Function, *inputs: Tensor) -> int:
    """The number of operators that write into memory which was there."""
    targets = [n.target for n in both(function, *inputs).graph.nodes if n.op == "call_function"]
    writing = {*buffers._ELEMENTWISE.values(), *buffers._OTHERS.values()}
    return sum(target in writing for target in targets)


def test_an_operand_that_nobody_needs_is_written_into() -> None:
    x = torch.randn(3, 4)
    assert reused(lambda x: [x.sin() * 2.0 + 1.0], x) == 2
    assert reused(lambda x: [x * 2.0 + 1.0], x) == 1, "an input is not the graph's own"
    assert reused(lambda x: [x.sin(), x.sin() * 2.0], x) == 0, "an output is needed"
    assert reused(lambda x: [(y := x.sin()) * y], x) == 1, "the same elements twice"
    assert reused(lambda x: [(y := x.sin()) * 2.0, y.sum(0)], x) == 0, "somebody reads it later"
    assert reused(lambda x: [F.relu(x.sin()).neg().exp()], x) == 3


def test_elements_in_another_order_are_not_written_over() -> None:
    x = torch.randn(4, 4)
    assert reused(lambda x: [(y := x.sin()) * y.t()], x) == 0
    assert reused(lambda x: [(y := x.sin())[1:] * y[:-1]], x) == 0, "two overlapping parts"
    assert reused(lambda x: [x.sin().t() * 2.0], x) == 1, "all of it, in its own order"
    assert reused(lambda x: [x.sin()[0] * x], x) == 0, "smaller than the result"
    assert reused(lambda x: [x.sin().expand(2, 4, 4) * 2.0], x) == 0


def test_parts_keep_the_whole_alive() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x.sin()
        first, second = y.split(2)
        z = x.cos() * y
        return [z, z.exp() + 1.0, first * second]

    assert reused(function, torch.randn(4, 3)) == 2


def test_what_died_earlier_is_written_into() -> None:
    def function(x: Tensor) -> list[Tensor]:
        total = (x.sin() @ x).sum()  # neither the sine nor the product is needed any more
        return [total + (x.exp().view(2, 8) * 2.0).sum(), torch.bmm(x[None], x[None]).clone(), x.t() * 3.0]

    assert reused(function, torch.randn(4, 4)) >= 3


def test_gradients_of_a_network_with_pooling() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        def loss(w: Tensor) -> Tensor:
            y = F.conv2d(x, w, padding=1)
            y = (y - y.mean((0, 2, 3), keepdim=True)) * (y.var((0, 2, 3), keepdim=True) + 0.1).rsqrt()
            return F.max_pool2d(F.relu(y), 2).square().sum()

        gradient = torch.func.grad(loss)
        return [gradient(w), torch.func.grad(lambda w: gradient(w).square().sum())(w)]

    assert reused(function, torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)) > 20


def test_no_more_memory_is_held_at_the_peak() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x.sin()  # dies at once, and could be written into at the very end
        z = torch.cat([y.sum()[None].expand(64) * x[0]] * 4)
        for _ in range(3):
            z = torch.cat([z, z]).cumsum(0)[::2].contiguous().cumsum(0)
        return [x * z[: x.numel()].sum()]

    x = torch.randn(16, 64)
    module = both(function, x)
    plain = trace(function, [x])
    assert peak(module) <= peak(plain)


def peak(module: fx.GraphModule) -> int:
    """Bytes of all storages that are alive at once while the graph runs."""
    alive: dict[int, int] = {}
    most = 0
    nodes = list(module.graph.nodes)
    last = {n: max((i for i, m in enumerate(nodes) if n in m.all_input_nodes), default=i) for i, n in enumerate(nodes)}
    values: dict[fx.Node, Tensor] = {}

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal most
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values[n] = value
            alive.clear()
            for tensor in values.values():
                alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))
            for old in [o for o in values if last[o] <= nodes.index(n)]:
                del values[old]
            return value

    Watched(module).run(*(torch.randn(n.meta["val"].shape) for n in nodes if n.op == "placeholder"))
    return most


def test_graphs_that_write_of_themselves_stay_as_they_are() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output((graph.call_function(torch.ops.aten.add_.Tensor, (y, 1.0)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    code = module.code
    assert buffers.recycle(module).code == code
