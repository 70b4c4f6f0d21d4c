"""Every way of computing a meta-gradient gives the same numbers: what is kept, how it is run, who runs it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from metaoptim import rules
from metaoptim.algorithms import maml, reptile
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.core import objectives, trees
from metaoptim.core.losses import mse
from metaoptim.core.types import Batch, Estimate, MetaOptimizer, MetaParams, Params, Rule, State, Step, Task
from metaoptim.engine import Choice, Engine
from metaoptim.engine.graphs.bindings import direct
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.graphs.trace import trace
from metaoptim.estimators import Checkpointed, Unroll
from metaoptim.learners import ClosedForm, GradientLearner, Network
from metaoptim.nn import mlp

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache", "reused_buffers")

RULES: dict[str, Callable[[], Rule]] = {
    "sgd": lambda: rules.SGD(0.1),
    "momentum": lambda: rules.Momentum(0.1),
    "adam": lambda: rules.Adam(0.1),
    "clip": lambda: rules.chain(rules.Clip(0.3), rules.SGD(0.1)),
    "clip by value": lambda: rules.chain(rules.Clip(value=0.2), rules.Momentum(0.1)),
    "meta-sgd": lambda: StepSizes(0.05, 0.15),
}
MASKS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "head": lambda name: name.startswith("2."),
    "body": lambda name: name.startswith("0."),
}


def tasks(count: int = 3, rows: int = 6) -> Task:
    g = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Batch:
        return torch.randn(count, rows, 3, generator=g), torch.randn(count, rows, 2, generator=g)

    return Task(draw(rows), draw(rows + 1))


def build(rule: Rule, steps: int, estimator: Unroll, **options: Any) -> MetaOptimizer:
    network = Network(mlp((3, 4, 2), "tanh"), mse)
    learner = GradientLearner(network, rule, steps, **options)
    weights = network.weights()
    return MetaOptimizer(
        learner, estimator, MetaParams(weights, rule.start(trees.select(weights, learner.adapts), torch.Generator()))
    )


def run(optimizer: MetaOptimizer, *settings: str, batch: Task | None = None) -> list[Tensor]:
    engine, batch = Engine(optimizer, *settings), batch or tasks()
    found = engine(optimizer.phi, batch, engine.init(optimizer.phi, batch))
    return trees.flatten((found.loss, found.grad, found.carry, dict(sorted(found.info.items()))))


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 1e-9 * b.norm()


# --- What is kept of the inner run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first order"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_length(rule: str, steps: int, first_order: bool) -> None:
    optimizer = build(RULES[rule](), steps, Unroll(first_order), prox=0.0 if rule == "adam" else 0.3)
    expected = run(optimizer, "loop", "graph", "eager")
    for memory in ("steps", "mixed"):
        check_same(run(optimizer, "vmap", memory, "eager"), expected)


@pytest.mark.parametrize("learnt", MASKS)
@pytest.mark.parametrize("adapted", MASKS)
@pytest.mark.parametrize("rule", ["momentum", "meta-sgd"])
def test_every_masking(rule: str, adapted: str, learnt: str) -> None:
    optimizer = replace(build(RULES[rule](), 2, Unroll(), adapts=MASKS[adapted]), learns=MASKS[learnt])
    expected = run(optimizer, "loop", "graph", "eager")
    for memory in ("steps", "mixed"):
        check_same(run(optimizer, "vmap", memory, "eager"), expected)


@pytest.mark.parametrize(
    ("objective", "steps"),
    [(objectives.last, 0), (objectives.trajectory_mean, 3), (objectives.multi_step([0.5, 0.0, 2.0]), 3),
     (objectives.multi_step([1.0, 0.5, 0.0]), 3), (lambda steps, outer_step: (0.3, 0.0, 0.7), 2)],
    ids=["no step", "mean", "a gap", "the last counts for nothing", "the start counts"],
)  # fmt: skip
@pytest.mark.parametrize("judged_on", ["query", "support"])
def test_every_objective(objective: objectives.Objective, steps: int, judged_on: Any) -> None:
    optimizer = build(rules.Momentum(0.1), steps, Unroll(False, objective, judged_on))
    expected = run(optimizer, "loop", "graph", "eager")
    for memory in ("steps", "mixed"):
        check_same(run(optimizer, "vmap", memory, "eager"), expected)


def test_an_unroll_says_how_it_keeps_its_states() -> None:
    kept = [Unroll(True, judged_on="support").keeping(memory) for memory in Unroll.memories]
    states, mixed = Checkpointed(True, judged_on="support"), Checkpointed(True, judged_on="support", mixed=True)
    assert kept == [Unroll(True, judged_on="support"), states, mixed]
    assert [mixed.keeping(memory) for memory in Checkpointed.memories] == [states, mixed]
    optimizer = build(rules.Momentum(0.1), 3, Unroll())
    for memory in Checkpointed.memories:
        by_itself = replace(optimizer, estimator=Checkpointed())
        check_same(run(by_itself, "loop", memory, "eager"), run(optimizer, "loop", "graph", "eager"))
    with pytest.raises(ValueError, match=r"steps, mixed"):
        run(by_itself, "loop", "graph", "eager")


def test_weights_of_an_objective_are_as_exact_as_the_networks() -> None:
    optimizer, batch = build(rules.SGD(0.1), 3, Unroll(objective=objectives.trajectory_mean)), tasks()
    torch.set_default_dtype(torch.float32)
    expected = run(optimizer, "loop", "graph", "eager", batch=batch)
    check_same(run(optimizer, "loop", "steps", "eager", batch=batch), expected)


def test_minibatches_and_a_start_from_the_support() -> None:
    def start(weights: Params, support: Batch) -> Params:
        return {"2.bias": weights["2.bias"] + support[1].mean(0)}

    optimizer = build(rules.SGD(0.1), 4, Unroll(), batch_size=4, start=start)
    expected = run(optimizer, "loop", "graph", "eager")
    for memory in ("steps", "mixed"):
        check_same(run(optimizer, "vmap", memory, "eager"), expected)


@pytest.mark.parametrize("memory", ["steps", "mixed"])
def test_a_closed_form(memory: str) -> None:
    def fit(network: Network, phi: MetaParams, support: Batch) -> State:
        z = network.features(phi.weights, support[0], None)
        return torch.linalg.solve(z.mT @ z + phi.rule["lam"] * torch.eye(4), z.mT @ support[1])

    def predict(network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        return network.features(phi.weights, x, support) @ state

    network = Network(mlp((3, 4, 2), "tanh"), mse)
    phi = MetaParams(network.weights(), {"lam": torch.tensor(0.7)})
    optimizer = MetaOptimizer(ClosedForm(network, fit, predict), Unroll(), phi, learns=lambda n: not network.in_head(n))
    check_same(run(optimizer, "vmap", memory, "eager"), run(optimizer, "loop", "graph", "eager"))


def test_a_loss_that_is_written_out_has_a_forward_mode_in_a_loop_too() -> None:
    """The loop is plain autograd, but for the one place where mixed needs function transforms."""
    optimizer = maml(mlp((3, 4, 2)), nn.functional.huber_loss, steps=2)
    check_same(run(optimizer, "loop", "mixed", "eager"), run(optimizer, "loop", "graph", "eager"))


def test_a_function_without_forward_mode_is_refused_by_mixed_alone() -> None:
    optimizer = maml(mlp((3, 4, 2)), lambda x, y: torch.ops.aten.mse_loss(x, y), steps=2)
    check_same(run(optimizer, "vmap", "steps", "trace"), run(optimizer, "loop", "graph", "eager"))
    with pytest.raises(ValueError, match=r'no forward mode in torch, which memory="mixed" needs: use memory="steps"'):
        run(optimizer, "vmap", "mixed", "eager")


# --- How it is run ------------------------------------------------------------------------------------------------------


FEW_TRACED = [("vmap", "graph"), ("loop", "steps"), ("workers:2", "graph"), ("workers:5:1", "steps")]
MORE_TRACED = [pytest.param(*how, marks=pytest.mark.slow) for how in (("vmap:2", "mixed"), ("workers:2:2", "mixed"))]


@pytest.mark.parametrize(("batching", "memory"), [*FEW_TRACED, *MORE_TRACED])
def test_a_traced_run_gives_the_same_numbers_on_other_data_too(batching: str, memory: str) -> None:
    optimizer = build(rules.Momentum(0.1), 3, Unroll())
    engine = Engine(optimizer, batching, memory, "trace")
    for scale in (1.0, -2.0):
        batch = trees.map_tensors(lambda x, scale=scale: scale * x, tasks(5))
        meta = MetaParams({n: scale * w for n, w in optimizer.phi.weights.items()}, {})
        found, expected = engine(meta, batch), Engine(optimizer, "loop", "graph", "eager")(meta, batch)
        check_same(trees.flatten(found.grad), trees.flatten(expected.grad))
        check_same([found.loss], [expected.loss])


def graphs(engine: Engine) -> int:
    assert engine.choice is not None
    return len(engine.executor(engine.choice).graphs.graphs)


@pytest.mark.slow
def test_a_graph_is_made_anew_exactly_when_it_must() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = maml(net, mse)
    engine = Engine(optimizer, "vmap", "graph", "trace")
    meta = optimizer.phi

    def count(meta: MetaParams, batch: Task) -> int:
        engine(meta, batch)
        return graphs(engine)

    assert [count(meta, tasks()) for _ in range(2)] == [1, 1]
    assert count(MetaParams({n: 2 * w for n, w in meta.weights.items()}, {}), tasks(rows=6)) == 1, "other values"
    assert count(meta, tasks(4)) == 2, "another T"
    assert count(meta, tasks(rows=7)) == 3, "another S"
    single = trees.map_tensors(Tensor.float, (meta, tasks()))
    assert count(*single) == 4, "another dtype"
    transposed = tasks()
    x, y = transposed.support
    assert count(meta, Task((x.mT.contiguous().mT, y), transposed.query)) == 5, "other strides"
    net.eval()
    assert count(meta, tasks()) == 6, "another mode of the module"
    net.train()
    assert count(meta, tasks()) == 6, "known"


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2"])
@pytest.mark.slow
def test_dropout_draws_as_it_does_without_a_graph_and_anew_every_time(how: str) -> None:
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse, steps=2)
    traced, eager = Engine(optimizer, how, "graph", "trace"), Engine(optimizer, how, "graph", "eager")
    traced(optimizer.phi, tasks())
    seen = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        seen.append(traced(optimizer.phi, tasks()))
        torch.manual_seed(seed)
        check_same(trees.flatten(seen[-1].grad), trees.flatten(eager(optimizer.phi, tasks()).grad))
    assert seen[0].loss != seen[1].loss


@pytest.mark.slow
def test_threads_drop_the_same() -> None:
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse)
    found = []
    for settings in (("loop", "graph", "eager"), ("workers:2", "steps", "trace"), ("workers:2:2", "mixed", "trace")):
        torch.manual_seed(3)
        found.append(run(optimizer, *settings))
    for other in found[1:]:
        check_same(other, found[0])


def test_threads_that_would_race_for_random_numbers_are_refused() -> None:
    def noisy(weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return mse(batch[0] @ weights["w"] + torch.rand(2), batch[1]), {}

    optimizer = MetaOptimizer(GradientLearner(noisy, rules.SGD(0.1), 1), Unroll(), MetaParams({"w": torch.randn(3, 2)}, {}))
    with pytest.raises(
        ValueError, match=r"^engine\.batching = 'workers:2': this learner draws from torch's generator, .* loop or vmap"
    ):
        Engine(optimizer, "workers:2", "graph", "trace")(optimizer.phi, tasks())


def test_threads_leave_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    optimizer = maml(mlp((3, 4, 2)), mse)
    Engine(optimizer, "workers:2", "graph", "trace")(optimizer.phi, tasks())
    assert torch.get_num_threads() == before


def test_at_rest_an_engine_holds_neither_threads_nor_memory_and_goes_on_as_before() -> None:
    optimizer, before = maml(mlp((3, 4, 2)), mse), set(threading.enumerate())  # of which an earlier engine's may end meanwhile
    engine = Engine(optimizer, "workers:2", "graph", "trace")
    first = engine(optimizer.phi, tasks())
    way = engine.executor(Choice("workers:2", "graph", "trace"))
    own = set(threading.enumerate()) - before
    assert own and way.graphs.scratch.free
    engine.release()
    assert not any(thread.is_alive() for thread in own) and not way.graphs.scratch.free
    again = engine(optimizer.phi, tasks())
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(first.grad), trees.flatten(again.grad), strict=True))


def test_what_a_graph_returns_are_ordinary_tensors() -> None:
    optimizer = reptile(mlp((3, 4, 2)), mse, steps=2)
    engine = Engine(optimizer, "vmap", "graph", "trace")
    found = engine(optimizer.phi, tasks(), engine.init(optimizer.phi, tasks()))
    assert not any(x.is_inference() for x in trees.flatten((found.loss, found.grad, found.carry, dict(found.info))))


def test_a_branch_that_values_decide_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    optimizer = maml(Branch(), mse)
    with pytest.raises(ValueError, match=r"the module itself \(Branch\) branches on a value .* runtime=\"eager\""):
        Engine(optimizer, "loop", "graph", "trace")(optimizer.phi, tasks())
    Engine(optimizer, "loop", "graph", "eager")(optimizer.phi, tasks())


def nodes(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    graph = trace(function, inputs).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_what_does_nothing_is_taken_out_of_a_graph() -> None:
    x = torch.randn(3)
    assert nodes(lambda x: [x.detach().view(3).sin()], x) == ["aten.sin.default"]
    assert nodes(lambda x: [x.sin() + x.sin()], x) == ["aten.sin.default", "aten.add.Tensor"]
    assert nodes(lambda x: [(x.cos(), x.sin())[1]], x) == ["aten.sin.default"]
    assert nodes(lambda x: [x * 2, x * 2.0], x) == ["aten.mul.Tensor", "aten.mul.Tensor"], "operands of another type"
    assert len(nodes(lambda x: [torch.rand_like(x) + torch.rand_like(x)], x)) == 3, "random numbers are drawn twice"
    assert nodes(lambda x: [torch.zeros_like(x).copy_(x).detach()], x) == [], "written in place, into what is new"
    assert nodes(lambda x: [x + torch.zeros_like(x).view(3) * x], x) == []
    assert len(nodes(lambda x: [x + torch.zeros(2, 3)], x)) == 2, "zeros that make it larger"
    assert len(nodes(lambda x: [torch.add(x, torch.zeros(3), alpha=2), x.sum() * 0.0], x)) > 2, "only zeros that were made"


def test_views_of_views_and_constants_that_are_made_again_are_taken_out() -> None:
    x, mine, mine_too = torch.randn(2, 6), torch.ones(3), torch.ones(3)
    assert nodes(lambda x: [x.unsqueeze(0).view(3, 4).unsqueeze(1)], x) == ["aten.view.default"]
    assert nodes(lambda x: [x.T.unsqueeze(0).squeeze(0).T + 1], x) == ["aten.add.Tensor"], "it is there and back"
    assert nodes(lambda x: [x.T.reshape(12)], x) == ["aten.permute.default", "aten.clone.default", "aten.view.default"]
    assert nodes(lambda x: [x * torch.tensor(2.0) + x * torch.tensor(2.0)], x) == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert len(nodes(lambda x: [x * torch.tensor(2.0) + x * torch.tensor(3.0)], x)) == 3
    assert len(nodes(lambda x: [x[0, :3] * mine + x[0, :3] * mine_too], x)) > 4, "theirs may be written into"


def test_operators_that_are_called_directly_give_the_same_values() -> None:
    def f(x: Tensor, i: Tensor) -> list[Tensor]:
        y = torch.cat([x.mean(1, keepdim=True), 2 - x, x.pow(2).sum((0, 1), keepdim=True).expand(3, 1)], 1)
        z = torch.add(y, y.exp().lerp(y, y), alpha=2).clamp(-1, 1) @ y.mT
        return [
            z.amax(-1).log(),
            torch.where(z > 0, z, 1.0),
            x.gather(1, i),
            (i & 1) * 3,
            *z.unsqueeze(0).transpose(1, 2).unbind(1),
        ]

    x, i = torch.randn(3, 4), torch.tensor([[0], [3], [2]])
    module = trace(f, [x, i])
    expected = module(x, i)
    direct(module)
    found = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert torch.add in found and torch.mean in found
    assert not any(str(target).startswith(("aten.add", "aten.sum", "aten.lerp", "aten.cat")) for target in found)
    for a, b in zip(module(x, i), expected, strict=True):
        assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())


def test_cleaning_keeps_the_values() -> None:
    def f(x: Tensor) -> list[Tensor]:
        return [x.sin().detach() + x.sin() * x.view(2, 3).view(6), x.cos()]

    x = torch.randn(6)
    module = trace(f, [x])
    for a, b in zip(module(x), f(x), strict=True):
        assert torch.equal(a, b)


def test_what_is_written_in_place_is_returned_where_nobody_else_sees_it() -> None:
    def alone(x: Tensor) -> list[Tensor]:
        return [x.sin().relu_() + 1, x.sin().div_(x.cos().sum())]

    def seen(x: Tensor) -> list[Tensor]:
        y = x.sin()
        half, again = y[:3], x.sin()
        y[3:].relu_()
        y.div_(x.sum())
        return [y, half + 1, again]

    x = torch.randn(6)
    assert nodes(alone, x).count("aten.sin.default") == 1, "both are made from the same"
    for f in (alone, seen):
        for a, b in zip(trace(f, [x])(x), f(x), strict=True):
            assert torch.equal(a, b)


@dataclass(frozen=True)
class Scheduled:
    """u = −schedule(k) · g, with k as the tensor that it is."""

    schedule: Callable[[Tensor], Any]

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return {n: -self.schedule(step.k) * g for n, g in grads.items()}, state


SCHEDULES: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda k: 0.1 * 0.5**k,
    "a choice": lambda k: torch.where(k < 3, 0.1, 0.01),
    "a look-up": lambda k: torch.tensor([0.1, 0.2, 0.1, 0.3, 0.1]).index_select(0, k.reshape(1)).squeeze(),
    "the next one": lambda k: 0.1 * ((k + 1) % 2 == 0),
}


@pytest.mark.parametrize("batching", [pytest.param("loop", marks=pytest.mark.slow), "vmap"])
@pytest.mark.parametrize("memory", ["steps", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_that_differ_by_their_number_share_a_graph(name: str, memory: str, batching: str) -> None:
    optimizer = build(Scheduled(SCHEDULES[name]), 5, Unroll())
    expected = run(optimizer, "loop", "graph", "eager")
    check_same(run(optimizer, batching, memory, "eager"), expected)
    engine, batch = Engine(optimizer, batching, memory, "trace"), tasks()
    found = engine(optimizer.phi, batch)
    check_same(trees.flatten((found.loss, found.grad, dict(sorted(found.info.items())))), expected)
    assert graphs(engine) <= 6


@pytest.mark.parametrize(
    "schedule", [lambda k: 0.1 if k < 3 else 0.01, lambda k: [0.1, 0.2, 0.3, 0.4][int(k)]], ids=["if", "int"]
)
@pytest.mark.slow
def test_a_branch_on_the_number_of_the_step_is_never_frozen_into_a_graph(schedule: Callable[[Tensor], float]) -> None:
    optimizer = build(Scheduled(schedule), 4, Unroll())
    expected = run(optimizer, "loop", "graph", "eager")
    for batching, memory in (("vmap", "graph"), ("vmap", "steps"), ("loop", "mixed")):
        check_same(run(optimizer, batching, memory, "eager"), expected)
    check_same(run(optimizer, "vmap", "graph", "trace"), expected)  # a graph of its own for each step
    with pytest.raises(ValueError, match=r'branches on a value.*runtime="eager"'):
        run(optimizer, "vmap", "steps", "trace")


@pytest.mark.parametrize("memory", ["steps", "mixed"])
@pytest.mark.slow
def test_the_number_of_graphs_does_not_grow_with_the_steps(memory: str) -> None:
    counts = []
    for steps in (5, 9):
        optimizer = build(rules.Momentum(0.1), steps, Unroll())
        engine = Engine(optimizer, "loop", memory, "trace")
        engine(optimizer.phi, tasks())
        counts.append(graphs(engine))
    assert counts[0] == counts[1] <= 6


# --- Compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_numbers() -> None:
    optimizer = build(rules.Momentum(0.1), 2, Unroll())
    check_same(run(optimizer, "vmap", "mixed", "compile"), run(optimizer, "loop", "graph", "eager"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 300])
def test_a_compiled_graph_is_found_again_but_not_with_the_constants_of_another(size: int) -> None:
    counters["inductor"].clear()
    x = torch.randn(4, size)
    for seed in range(3):
        own = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)

        def function(x: Tensor, own: Tensor = own) -> tuple[list[Tensor], None]:
            return [(x * own).tanh() + own.sum()], None

        (found,), _ = Graphs(compiled=True)("name", function, [x])
        torch.testing.assert_close(found, function(x)[0][0])
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2


def test_without_a_compiler_the_graph_runs_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found in (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE=1 for much more")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    optimizer = build(rules.SGD(0.1), 1, Unroll())
    said = """compiling is not to be had here (No working C++ compiler found in (None, 'g++')); the traced graph"""
    with pytest.warns(UserWarning, match="^" + re.escape(said)):
        found = run(optimizer, "vmap", "graph", "compile")
    check_same(found, run(optimizer, "loop", "graph", "eager"))


# --- bfloat16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["eager", pytest.param("trace", marks=pytest.mark.slow)])
def test_bfloat16_is_near_and_keeps_the_dtype(runtime: str) -> None:
    torch.set_default_dtype(torch.float32)
    optimizer = maml(mlp((3, 40, 2)), mse, steps=2)
    batch: Task = trees.map_tensors(Tensor.float, tasks())

    def gradient(precision: str) -> Estimate:
        return Engine(optimizer, "vmap", "graph", runtime, precision)(optimizer.phi, batch)

    full, half = gradient("full"), gradient("bf16")
    for a, b in zip(trees.flatten(half.grad), trees.flatten(full.grad), strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 * b.norm() < (a - b).norm() < 0.1 * b.norm()
