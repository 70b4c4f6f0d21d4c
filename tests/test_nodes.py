"""Graphs inside of graphs: one for all steps, the same numbers as without, and nobody's memory but their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from metaoptim import compose, rules
from metaoptim.core import trees
from metaoptim.core.losses import mse
from metaoptim.core.types import Estimator, MetaOptimizer, Params, State, Step, Task
from metaoptim.engine import Engine
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.options import Choice
from metaoptim.estimators import Truncated, Unroll, nres, pes, truncated_es
from metaoptim.nn.noise import _randn_like, noise, normals, one_pass

pytestmark = pytest.mark.usefixtures("doubles", "reused_buffers")

Function = Callable[..., list[Tensor]]


def nested(function: Function, *inputs: Tensor, times: int = 3, compiled: bool = False) -> tuple[Graphs, list[Tensor]]:
    """What a graph gives that calls the function `times` in a row, on what it returned before, and that none is an input."""
    graphs = Graphs(compiled=compiled)

    def outer(*inputs: Tensor) -> tuple[list[Tensor], None]:
        given: Any = list(inputs)
        for _ in range(times):
            given = graphs("part", lambda *x: (function(*x), None), given)[0]
        return given, None

    expected: Any = inputs
    for _ in range(times):
        expected = function(*expected)
    kept = [x.clone() for x in inputs]
    for _ in range(2):  # the second time in memory that the first has left
        found = graphs("outer", outer, inputs)[0]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if not compiled else torch.allclose(a, b)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "an input was written into"
    return graphs, found


def count(graphs: Graphs) -> int:
    """Functions that became nodes."""
    return sum(node is not None for node, _ in graphs.nodes.values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x @ y, (x * 2).exp().sin() + y],
        lambda x, y: [y, x],  # inputs, as they are
        lambda x, y: [(z := x.sin()), z],  # one result twice
        lambda x, y: [x.t(), (x.cos() + y).t()],  # views, and another order of axes
        lambda x, y: [x[:, :1].expand(3, 3), y.flip(0)],
        lambda x, y: [x + 1, (x * y).sum(0).expand(3, 3)],
    ],
)
def test_what_is_done_again_and_again_is_one_node(function: Function, compiled: bool) -> None:
    graphs, found = nested(function, torch.randn(3, 3), torch.randn(3, 3).t(), compiled=compiled)
    assert count(graphs) == len(graphs.nodes) == 1 and len(graphs.graphs) == 1
    assert len({x.data_ptr() for x in found}) == len(found) and all(x.is_contiguous() for x in found)


def test_numbers_that_are_no_floats_go_through() -> None:
    graphs, _ = nested(lambda k, x: [k + 1, torch.where(k > 1, x, -x)], torch.tensor(0), torch.randn(2, 2).to(torch.float32))
    assert count(graphs) == 1


def test_what_draws_stays_a_part_of_the_graph() -> None:
    graphs = Graphs()

    def twice(x: Tensor) -> tuple[list[Tensor], None]:
        return [graphs("drop", lambda x: ([F.dropout(x)], None), [x])[0][0] for _ in range(2)], None

    (a, b), _ = graphs("outer", twice, [torch.ones(64)])
    assert count(graphs) == 0 and graphs.draws and not torch.equal(a, b)


def test_an_error_of_what_is_traced_is_the_users() -> None:
    def wrong(x: Tensor) -> list[Tensor]:
        raise KeyError("weight")

    with pytest.raises(KeyError, match="weight"):
        nested(lambda x: [x + 1] if x.shape == () else wrong(x), torch.randn(2))


def test_noise_that_is_drawn_together_is_what_single_draws_are() -> None:
    shapes, keys = [(2, 3), (), (1, 4)], torch.tensor([5, 2**31 - 1])
    together = vmap(lambda key: normals(key, shapes, torch.float64, 1 << 30))(keys)
    for i, shape in enumerate(shapes):
        for j, key in enumerate(keys):
            with noise(key, part=(1 << 30) + i), one_pass():
                assert torch.equal(together[i][j], _randn_like(torch.empty(shape)))


# --- In evolution strategies --------------------------------------------------------------------------------------------


ES: dict[str, Callable[..., Estimator]] = {"truncated": truncated_es, "persistent": pes, "reused": nres}


def tasks() -> Task:
    g = torch.Generator().manual_seed(1)
    return Task(*((torch.randn(3, n, 3, generator=g), torch.randn(3, n, 2, generator=g)) for n in (6, 7)))


def dropping(estimator: Estimator) -> MetaOptimizer:
    """Of a net whose masks differ from step to step, by a rule that counts."""
    net = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2))
    return replace(compose(net, mse, rule=rules.Adam(0.1), steps=4), estimator=estimator)


def steps(method: MetaOptimizer, *settings: str) -> tuple[Engine, list[Tensor]]:
    """Two outer steps: a window each, the second going on where the first ends."""
    torch.manual_seed(3)
    engine, batch, found, carry = Engine(method, *settings), tasks(), list[Tensor](), None
    for i in range(2):
        estimate = engine(method.phi, batch, carry, i)
        carry = estimate.carry
        found += trees.flatten((estimate.loss, estimate.grad, carry, dict(sorted(estimate.info.items()))))
    return engine, found


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).double().norm() <= 1e-9 * b.double().norm()


@pytest.mark.parametrize("noise", ES)
def test_evolution_strategies_trace_one_step_and_give_the_same_numbers(noise: str) -> None:
    method = dropping(ES[noise](2, 0.1, 2))
    _, expected = steps(method, "loop", "graph", "eager")
    for batching in ("vmap", "loop", "workers:2:2"):
        engine, found = steps(method, batching, "graph", "trace")
        check_same(found, expected)
        graphs = engine.executor(Choice(batching, "graph", "trace")).graphs
        sizes = 2 if batching == "workers:2:2" else 1  # the last piece has one task
        assert count(graphs) == len(graphs.nodes) == 3 * sizes, "start, step and end, however many steps there are"


class Counts(rules.SGD):
    """Steps that get smaller as it counts them, in an attribute of its own."""

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        n = getattr(self, "n", 0) + 1
        object.__setattr__(self, "n", n)
        return {name: -self.lr / n * g for name, g in grads.items()}, state


class CountsAlone(rules.SGD):
    """A count that nothing depends on."""

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        object.__setattr__(self, "n", getattr(self, "n", 0) + 1)
        return rules.SGD.update(self, psi, grads, state, weights, step)


class Remembers(Counts):
    """A number that is made when it is first needed, and then kept."""

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        if getattr(self, "half", None) is None:
            object.__setattr__(self, "half", 0.5)
        return {name: -self.lr * self.half * g for name, g in grads.items()}, state


@pytest.mark.parametrize("estimator", [pes(2, 0.1, 2), Unroll()])
def test_a_rule_that_changes_itself_is_run_by_the_loop(estimator: Estimator) -> None:
    method = replace(compose(nn.Linear(3, 2), mse, rule=Counts(0.1), steps=4), estimator=estimator)
    with pytest.warns(UserWarning, match=r"`.*\.n` changes while it runs.* From here on: loop, graph, eager"):
        steps(method, "vmap", "graph", "trace")


def test_the_loop_that_takes_over_draws_what_it_would_have_drawn() -> None:
    method = replace(compose(nn.Linear(3, 2), mse, rule=CountsAlone(0.1), steps=4), estimator=pes(2, 0.1, 2))
    with pytest.warns(UserWarning, match="From here on: loop, graph, eager"):
        _, found = steps(method, "vmap", "graph", "trace")
    check_same(found, steps(method, "loop", "graph", "eager")[1])


@pytest.mark.filterwarnings("error")
def test_a_rule_that_makes_something_once_is_traced_again() -> None:
    method = replace(compose(nn.Linear(3, 2), mse, rule=Remembers(0.1), steps=4), estimator=pes(2, 0.1, 2))
    engine, found = steps(method, "vmap", "graph", "trace")
    check_same(found, steps(method, "loop", "graph", "eager")[1])
    assert engine.choice == Choice("vmap", "graph", "trace")


@dataclass(frozen=True)
class ByNumber(rules.SGD):
    """A state that is a number, and no tensor."""

    def init(self, psi: Params, weights: Params) -> State:
        return {"n": 0}


@pytest.mark.parametrize("estimator", [pes(2, 0.1), Truncated(2)])
def test_a_state_that_is_no_tensor_is_told(estimator: Estimator) -> None:
    method = replace(compose(nn.Linear(3, 2), mse, rule=ByNumber(0.1), steps=4), estimator=estimator)
    with pytest.raises(ValueError, match=r"^the rule's state has 0 \(int\) in it, .* such as torch\.tensor\(0\)"):
        steps(method, "loop", "graph", "eager")


@pytest.mark.slow
def test_compiled_evolution_strategies_give_the_same_numbers() -> None:
    method = dropping(nres(4, 0.1, 2))
    check_same(steps(method, "vmap", "graph", "compile")[1], steps(method, "loop", "graph", "eager")[1])
