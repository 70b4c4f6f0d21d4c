"""Graphs that write into memory which they need no longer: the same numbers, no more memory, nobody else's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from metaoptim.engine.graphs import buffers
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.graphs.trace import trace

Function = Callable[..., Sequence[Tensor]]


pytestmark = pytest.mark.usefixtures("reused_buffers")


def both(function: Function, *inputs: Tensor) -> tuple[int, int]:
    """How many operators write into memory which was there, and how many pieces of it they take from outside.

    The graph gives what it gives without, three times, whatever lies in that memory.
    """
    plain, module = trace(function, inputs), trace(function, inputs)
    kinds, scratch = buffers.recycle(module), buffers.Scratch()
    kept = [x.clone() for x in inputs]
    for _ in range(3):
        with scratch.lent(kinds) as pieces:
            for a, b in zip(module(*inputs, *pieces), plain(*inputs), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride()
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "an input was written into"
        for piece in pieces:
            piece.fill_(float("nan"))
    assert sum(map(len, scratch.free.values())) == len(kinds), "the same pieces each time"
    writing = {*buffers._ELEMENTWISE.values(), *buffers._OTHERS.values()}
    return sum(node.target in writing for node in module.graph.nodes), len(kinds)


def reused(function: Function, *inputs: Tensor) -> int:
    """How many operators write into memory that the graph itself has made."""
    writing, taken = both(function, *inputs)
    return writing - taken


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


def test_as_many_pieces_are_taken_as_are_needed_at_once() -> None:
    def function(x: Tensor) -> list[Tensor]:
        total = torch.zeros(())
        for scale in (1.0, 2.0, 3.0, 4.0):
            total = total + ((x * scale) @ (x + scale)).sum()
        return [total]

    assert both(function, torch.randn(4, 4))[1] == 3, "two factors and their product"


def test_pieces_of_one_kind_serve_other_shapes_and_graphs() -> None:
    x, scratch = torch.randn(4, 4), buffers.Scratch()
    for function in (lambda x: [(x * 2.0).sum()], lambda x: [(x.view(2, 8) + 1.0).sum(0)]):
        module = trace(function, [x])
        with scratch.lent(buffers.recycle(module)) as pieces:
            assert torch.equal(module(x, *pieces)[0], function(x)[0])
    assert [len(found) for found in scratch.free.values()] == [1]
    with scratch.lent([(16, torch.float32, x.device)] * 2), scratch.lent([(16, torch.float64, x.device)]):
        pass
    assert sorted(len(found) for found in scratch.free.values()) == [1, 2]


def test_memory_that_is_not_in_use_is_given_back_before_another_graph_is_traced() -> None:
    graphs, x = Graphs(), torch.randn(4, 4)
    kept: list[int] = []

    def first(x: Tensor) -> tuple[Sequence[Tensor], None]:
        return [((x * 2.0).sin() + x).sum()], None

    def second(x: Tensor) -> tuple[Sequence[Tensor], None]:
        kept.append(len(graphs.scratch.free))
        return [x.sum()], None

    graphs("first", first, [x])
    assert graphs.scratch.free
    graphs("second", second, [x])
    assert set(kept) == {0}


def test_graphs_that_write_of_themselves_stay_as_they_are() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output((graph.call_function(torch.ops.aten.add_.Tensor, (y, 1.0)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    code = module.code
    assert buffers.recycle(module) == [] and module.code == code
