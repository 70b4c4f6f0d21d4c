"""What the core's types must carry beyond MAML's family, each method small and held to an independent oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.gradients import exact, held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import (
    Batch,
    Clock,
    Estimate,
    Estimator,
    Info,
    Loss,
    MetaOptimizer,
    MetaParams,
    Params,
    State,
    Step,
    Task,
)  # fmt: skip
from metaoptim.engine import Engine, offered
from metaoptim.estimators import Displacement, EvolutionStrategy, Implicit, Truncated, Unroll, nres, pes, truncated_es
from metaoptim.gradcheck import check
from metaoptim.gradcheck.claims import over_a_run
from metaoptim.learners import GradientLearner, Network
from metaoptim.nn import BatchNorm, mlp
from metaoptim.rules import SGD, Momentum
from metaoptim.runs.store import load_checkpoint

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")

CLOCK = Clock(torch.tensor(0), torch.tensor(7))


def regression(count: int = 3, rows: int = 6) -> Task:
    g = torch.Generator().manual_seed(1)

    def draw() -> Batch:
        return torch.randn(count, rows, 3, generator=g), torch.randn(count, rows, 2, generator=g)

    return Task(draw(), draw())


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    for x, y in zip(trees.flatten(a), trees.flatten(b), strict=True):
        assert (x - y).norm() <= tolerance * y.norm(), f"{x} is not {y}"


# --- Implicit gradients -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_implicit_gradient_is_that_of_a_long_unroll() -> None:
    """With weights that adapt, weights that are shared, and a prox, on a network that is not linear."""
    net, batch = mlp((3, 4, 2), "tanh"), regression()
    options: dict[str, Any] = {"rule": SGD(0.3), "steps": 60, "prox": 3.0}
    for adapts in ("all", "head"):
        unrolled = mo.compose(net, mse, adapts=adapts, **options)
        for estimator in (Implicit("cg", 40), Implicit("neumann", 200, scale=0.15)):
            implicit = mo.compose(net, mse, adapts=adapts, estimator=estimator, **options)
            for batching in ("loop", "vmap"):
                found = Engine(implicit, batching, "graph", "eager")(implicit.phi, batch)
                close(found.grad, Engine(unrolled, "vmap", "graph", "eager")(unrolled.phi, batch).grad, 1e-6)


# --- Windows of a long run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSizePerStep:
    """u = −α_k · g with one learnt α for each of K steps: ψ is indexed by k, a tensor."""

    lr: float
    steps: int

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {"lr": torch.linspace(self.lr, 2 * self.lr, self.steps, dtype=next(iter(weights.values())).dtype)}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        lr = psi["lr"].index_select(0, step.k.reshape(1)).squeeze(0)
        return {n: -lr * g for n, g in grads.items()}, state


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "trace"])
def test_a_run_of_a_thousand_steps_is_carried_and_one_graph_serves_all_of_them(runtime: str) -> None:
    window, steps = 10, 1000
    method = mo.compose(
        mlp((3, 4, 2), "tanh"), mse, rule=StepSizePerStep(0.02, steps), steps=steps, estimator=Truncated(window)
    )
    engine, batch = Engine(method, "vmap", "graph", runtime), regression()
    carry, total = engine.init(method.phi, batch), torch.zeros(steps)
    for t in range(steps // window):
        assert carry.k.tolist() == [t * window] * 3
        found = engine(method.phi, batch, carry, t)
        used = found.grad.rule["lr"] != 0
        assert used.nonzero().flatten().tolist() == list(range(t * window, (t + 1) * window)), "its own window alone"
        carry, total = found.carry, total + used
    assert carry.k.tolist() == [0] * 3 and total.tolist() == [1.0] * steps
    for t in range(3):
        *_, (k, state) = inner_loop(method.learner, method.phi, trees.index(batch.support, t), held)
        assert k == steps
        close(trees.index(carry.state, t), state, 1e-9)
    if runtime == "trace":
        assert engine.choice is not None
        assert len(engine.executor(engine.choice).graphs.graphs) == 1


def test_one_window_is_the_unroll_of_the_mean_and_a_later_one_holds_its_start() -> None:
    net, batch = mlp((3, 4, 2), "tanh"), regression()
    whole = mo.compose(net, mse, rule=Momentum(0.1), steps=6, estimator=Truncated(6))
    unrolled = replace(whole, estimator=Unroll(objective=trajectory_mean))
    engine = Engine(whole, "vmap", "graph", "eager")
    found = engine(whole.phi, batch, engine.init(whole.phi, batch))
    expected = Engine(unrolled, "loop", "graph", "eager")(whole.phi, batch)
    close((found.loss, found.grad), (expected.loss, expected.grad))
    report = check(
        replace(whole, estimator=Truncated(2)), batch, modes=[("loop", "graph", "eager"), ("vmap", "graph", "trace")]
    )
    assert report.ok and "of the whole run, by design" in str(report), report


def test_a_start_made_from_the_support_is_seen_by_all_that_begins() -> None:
    def start(weights: Params, support: Batch) -> Params:
        return {"2.bias": weights["2.bias"] + support[1].mean(0)}

    network, batch = Network(mlp((3, 4, 2), "tanh"), mse), regression()
    learner, phi = GradientLearner(network, Momentum(0.1), 2, start=start), MetaParams(network.weights(), {})

    def engine(estimator: Estimator) -> Engine:
        return Engine(MetaOptimizer(learner, estimator, phi), "loop", "graph", "eager")

    window, whole = engine(Truncated(2)), engine(Unroll(objective=trajectory_mean))
    found, expected = (e(phi, batch, e.init(phi, batch)) for e in (window, whole))
    close((found.loss, found.grad), (expected.loss, expected.grad))
    carry = trees.flatten(engine(Displacement(moments=True)).init(phi, batch))
    assert [x.shape for x in carry] == [(3, *p.shape) for p in phi.weights.values()] and not any(x.any() for x in carry)


def test_a_window_must_divide_the_run() -> None:
    for estimator in (Truncated(4), pes(4, 0.1)):
        with pytest.raises(ValueError, match=r"window=4: it must be at least 1 and divide the inner steps, which are 6"):
            mo.compose(mlp((3, 2)), mse, rule=SGD(0.1), steps=6, estimator=estimator)


# --- Evolution strategies -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A learner without an inner gradient: s_t = s_{t−1} + θ (or s_t = θ, where nothing is summed), judged by s_t²."""

    sums: bool
    steps: int = 2

    def length(self, support: Batch) -> int:
        return self.steps

    def adapts(self, name: str) -> bool:
        return False

    def init(self, phi: MetaParams, support: Batch) -> State:
        return {"s": 0 * phi.weights["t"], "nothing": {}}

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        return lambda x: (torch.zeros(()), {}), {}

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        return {"s": (state["s"] if self.sums else 0) + phi.weights["t"], "nothing": {}}

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        return state["s"].square(), {}

    def weights(self, phi: MetaParams, state: State) -> Params:
        return phi.weights

    def heritage(self, state: State) -> State:
        return ()

    def inherit(self, state: State, heritage: State) -> State:
        return state


NOTHING = Task(torch.zeros(1), torch.zeros(1))
ONE = MetaParams({"t": torch.tensor(1.0, dtype=torch.float64)}, {})


def windows(strategy: EvolutionStrategy, toy: Toy, count: int) -> Tensor:
    """Independent estimates (count, windows) at θ = 1, each with keys of its own."""
    draw = torch.Generator().manual_seed(3)

    def keys() -> Tensor:
        return torch.randint(2**31, (count,), generator=draw)

    def one(carry: Any, key: Tensor) -> tuple[Tensor, Any]:
        found = strategy(toy, ONE, NOTHING, carry, Clock(torch.tensor(0), key))
        return found.grad.weights["t"], found.carry

    carry = torch.func.vmap(lambda key: strategy.init(toy, ONE, NOTHING, key))(keys())
    found: list[Tensor] = []
    for _ in range(toy.steps // strategy.window):
        estimate, carry = torch.func.vmap(one)(carry, keys())
        found.append(estimate)
    return torch.stack(found, 1)


COUNT = 200_000


@pytest.mark.parametrize(
    ("build", "total"), [(pes, 10.0), (nres, 10.0), (truncated_es, 6.0)], ids=["PES", "NRES", "truncated ES"]
)
def test_strategies_on_a_sum(build: Callable[..., EvolutionStrategy], total: float) -> None:
    """d/dθ (s_1² + s_2²) = 10 at θ = 1, in windows of one step; truncated ES is blind to what s_1 owes to θ: 6."""
    found = windows(build(1, 0.1), Toy(sums=True), COUNT).sum(1)
    error = found.std() / COUNT**0.5
    assert abs(found.mean() - total) < 4 * error < 0.15
    many = build(1, 0.1, pairs=COUNT)  # the same with the pairs of one task
    carry, mean = many.init(Toy(True), ONE, NOTHING, torch.tensor(1)), torch.zeros(())
    for step in range(2):
        estimate = many(Toy(True), ONE, NOTHING, carry, Clock(torch.tensor(step), torch.tensor(5 + step)))
        carry, mean = estimate.carry, mean + estimate.grad.weights["t"]
    assert abs(mean - total) < 4 * error


@pytest.mark.parametrize(("build", "variances"), [(pes, [8.0, 12.0, 16.0]), (nres, [8.0] * 3), (truncated_es, [8.0] * 3)])
def test_their_variances(build: Callable[..., EvolutionStrategy], variances: list[float]) -> None:
    """Losses θ² after each step: the mean of an estimate is 2; its variance 4 (t + 1) for PES in window t = 1, 2, 3, else 8."""
    found = windows(build(1, 0.1), Toy(sums=False, steps=3), COUNT)
    for t, variance in enumerate(variances):
        assert abs(found[:, t].mean() - 2) < 4 * (variance / COUNT) ** 0.5
        assert abs(found[:, t].var() / variance - 1) < 0.05


def test_with_the_whole_run_as_a_window_all_strategies_are_one() -> None:
    method, batch = mo.compose(mlp((3, 4, 2), "tanh"), mse, rule=Momentum(0.1), steps=4), regression()
    found = [over_a_run(replace(method, estimator=build(4, 0.05, 3)), batch, 0) for build in (pes, nres, truncated_es)]
    for other in found[1:]:
        close(other, found[0], 1e-12)
    engines = [Engine(replace(method, estimator=e), "loop", "graph", "eager") for e in (pes(4, 1e-5), Truncated(4))]
    estimated, loss = (engine(method.phi, batch, engine.init(method.phi, batch)).loss for engine in engines)
    close(estimated, loss, 1e-8)


@pytest.mark.parametrize(("build", "right"), [(pes, True), (nres, True), (truncated_es, True)])
@pytest.mark.slow
def test_the_doctor_holds_a_strategy_to_its_claim(build: Callable[..., EvolutionStrategy], right: bool) -> None:
    method = mo.compose(mlp((3, 4, 2), "tanh"), mse, rule=SGD(0.3), steps=4, estimator=build(2, 0.05))
    report = check(method, regression(2), modes=[("loop", "graph", "eager"), ("vmap", "graph", "eager")])
    assert report.ok == right, report
    assert ("of the whole run, by design" in str(report)) == (build is truncated_es)


def test_the_doctor_catches_a_strategy_that_is_blind_to_its_past() -> None:
    @dataclass(frozen=True)
    class Blind(EvolutionStrategy):
        target = Unroll(objective=trajectory_mean)

    method = mo.compose(mlp((3, 4, 2), "tanh"), mse, rule=SGD(0.3), steps=4, estimator=Blind(2, 0.05, noise="truncated"))
    assert not check(method, regression(2), modes=[("loop", "graph", "eager")]).ok


# --- A policy gradient, by a source and an outer step of its own ---------------------------------------------------------

ARMS, EPISODES = 3, 40


def surrogate(weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
    """Minus the mean advantage times the ratio of probabilities, whose gradient and Hessian are the policy's."""
    ratio = (weights["logits"].log_softmax(-1)[batch["arm"]] - batch["logp"]).exp()
    return -(ratio * (batch["reward"] - batch["reward"].mean())).mean(), {"reward": batch["reward"].mean()}


@dataclass(frozen=True)
class Bandits:
    """Episodes of Bernoulli bandits with the current policy, and with the policies that have adapted to them."""

    learner: GradientLearner
    count: int = 20

    def __call__(self, outer_step: int, phi: MetaParams) -> Task:
        generator = torch.Generator().manual_seed(outer_step)
        found = []
        for _ in range(self.count):
            means = torch.rand(ARMS, generator=generator) * torch.tensor([0.2, 1.0, 1.0])
            support = self.play(phi.weights, means, generator)
            *_, (_, state) = inner_loop(self.learner, phi, support, held)
            found.append(Task(support, self.play(self.learner.weights(phi, state), means, generator)))
        batch: Task = trees.stack(found)
        return batch

    def play(self, weights: Params, means: Tensor, generator: torch.Generator) -> Batch:
        logp = weights["logits"].log_softmax(-1)
        arm = torch.multinomial(logp.exp(), EPISODES, replacement=True, generator=generator)
        return {"arm": arm, "logp": logp[arm], "reward": (torch.rand(EPISODES, generator=generator) < means[arm]).double()}


class LineSearch:
    """Steps of a given length along −∇φ, halved until the surrogate has fallen."""

    facts: Mapping[str, Any] = {"length": 1.0}

    def __init__(self) -> None:
        self.tries = 0

    def __call__(self, phi: MetaParams, estimate: Estimate, again: Callable[[MetaParams], Estimate]) -> MetaParams:
        length = 1.0
        while True:
            g = estimate.grad.weights["logits"]
            moved = MetaParams({"logits": phi.weights["logits"] - length * g / (g.norm() + 1e-12)}, {})
            self.tries += 1
            if again(moved).loss <= estimate.loss or length < 1e-3:
                return moved
            length /= 2

    def state(self) -> dict[str, Any]:
        return {"tries": self.tries}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.tries = state["tries"]


@pytest.mark.slow
def test_maml_learns_bandits_by_a_policy_gradient(tmp_path: Any) -> None:
    learner = GradientLearner(surrogate, SGD(4.0), 1)
    phi = MetaParams({"logits": torch.tensor([3.0, 0.0, 0.0])}, {})
    method, source = MetaOptimizer(learner, Unroll(), phi, name="policy"), Bandits(learner)
    report = check(method, source(0, phi), modes=[("loop", "graph", "eager"), ("vmap", "steps", "trace")])
    assert report.ok, report

    def train(folder: str, source: Any = source, resume: bool = False) -> mo.Run:
        return mo.train(method, None, source=source, outer_step=LineSearch(), iterations=60, tasks_per_step=20,
                        out=tmp_path / folder, resume=resume, progress=False, engine={"runtime": "eager", "memory": "graph"},
                        checkpoint_every=10, log_every=1)  # fmt: skip

    run = train("whole")
    reward = [source(step, run.phi).query["reward"].mean().item() for step in range(100, 120)]
    before = [source(step, phi).query["reward"].mean().item() for step in range(100, 120)]
    assert sum(reward) / 20 > 0.5 > 0.35 > sum(before) / 20

    def stopping(outer_step: int, phi: MetaParams) -> Task:
        if outer_step == 35:
            raise KeyboardInterrupt
        return source(outer_step, phi)

    with pytest.raises(KeyboardInterrupt):
        train("stopped", stopping)
    again = train("stopped", resume=True)
    assert torch.equal(again.phi.weights["logits"], run.phi.weights["logits"])
    tries = [load_checkpoint(tmp_path / folder, "last").state["scalars"] for folder in ("whole", "stopped")]
    assert tries[0] == tries[1] and tries[0]["outer/tries"] >= 60


# --- Weights for each inner step ----------------------------------------------------------------------------------------


def per_step(steps: int) -> MetaOptimizer:
    """Batch norms whose scale and shift have a version for each of s_0 … s_K, learnt and not adapted (MAML++)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), BatchNorm(4), nn.Tanh(), nn.Linear(4, 2))
    network = Network(net, mse, per_step=lambda n: n.startswith("1."), versions=steps + 1)
    weights = {n: p + 0.3 * torch.randn_like(p) for n, p in network.weights().items()}
    learner = GradientLearner(network, SGD(0.3), steps, adapts=lambda n: not n.startswith("1."))
    return MetaOptimizer(learner, Unroll(objective=trajectory_mean), MetaParams(weights, {}))


@pytest.mark.slow
def test_weights_per_step_are_right_in_every_way_of_the_engine() -> None:
    method, batch = per_step(3), regression()
    leaves = {n: p.clone().requires_grad_() for n, p in method.phi.weights.items()}
    total = torch.zeros(())
    for t in range(3):  # written out in plain autograd
        fast = {n: p for n, p in leaves.items() if not n.startswith("1.")}

        def loss(fast: Params, k: int, pair: Batch) -> Tensor:
            h = F.linear(pair[0], fast["0.weight"])
            h = F.batch_norm(h, None, None, leaves["1.weight"][k], leaves["1.bias"][k], training=True)
            return (F.linear(h.tanh(), fast["3.weight"], fast["3.bias"]) - pair[1]).square().mean()

        task: Task = trees.index(batch, t)
        for k in range(3):
            grads = torch.autograd.grad(loss(fast, k, task.support), list(fast.values()), create_graph=True)
            fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + loss(fast, k + 1, task.query) / 9
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert (expected["1.weight"].norm(dim=1) > 1e-3).all(), "every version counts"
    traced = [("vmap", "graph", "trace"), ("loop", "steps", "trace"), ("workers:2", "mixed", "trace")]
    for way in [way for way in offered(method) if way[2] == "eager"] + traced:
        found = Engine(method, *way)(method.phi, batch)
        close(found.grad.weights, expected)


def test_an_adapted_module_has_the_version_of_its_last_step() -> None:
    method, batch = per_step(2), regression()
    x, y = trees.index(batch.support, 0)
    run = mo.Run(method, method.phi)
    for steps in (0, 1, 2, 5):
        module = run.adapt((x, y), steps)
        assert torch.equal(module.get_parameter("1.weight"), method.phi.weights["1.weight"][min(steps, 2)])


# --- Fast weights -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_delta_rule_is_one_inner_step() -> None:
    """DeltaNet: S ← S (I − β k kᵀ) + β v kᵀ is a step of size β on ½ ‖S k − v‖² (Yang 2024, eq. 4)."""
    state, key, value, beta = torch.randn(4, 3), F.normalize(torch.randn(1, 3)), torch.randn(1, 4), 0.7

    def recall(weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
        return 0.5 * (batch[0] @ weights["S"].mT - batch[1]).square().sum(), {}

    learner = GradientLearner(recall, SGD(beta), 1)
    *_, (_, end) = inner_loop(learner, MetaParams({"S": state}, {}), (key, value), exact)
    k, v = key[0], value[0]
    close(end.fast["S"], state @ (torch.eye(3) - beta * torch.outer(k, k)) + beta * torch.outer(v, k), 1e-12)
    method = MetaOptimizer(learner, Unroll(), MetaParams({"S": state}, {}))
    batch = Task((key[None], value[None]), (key[None], value[None]))
    expected = Engine(method, "loop", "graph", "eager")(method.phi, batch)
    for way in offered(method):
        close(Engine(method, *way)(method.phi, batch).grad, expected.grad)


# --- Objectives and masks -----------------------------------------------------------------------------------------------


def test_an_objective_can_change_with_the_outer_step() -> None:
    """Weights that are tensors, made of the number of the outer step: one graph for all of them."""

    def annealed(steps: int, outer_step: Tensor) -> list[Tensor | float]:
        late = (outer_step / 10).clamp(max=1.0)
        return [0.0, 1 - late, late]

    method, batch = (
        mo.compose(mlp((3, 4, 2), "tanh"), mse, rule=SGD(0.3), steps=2, estimator=Unroll(objective=annealed)),
        regression(),
    )
    for way in (("loop", "graph", "eager"), ("vmap", "steps", "eager"), ("vmap", "graph", "trace"), ("loop", "mixed", "trace")):
        engine = Engine(method, *way)
        for step, weights in ((0, (0.0, 1.0, 0.0)), (4, (0.0, 0.6, 0.4)), (30, (0.0, 0.0, 1.0))):
            fixed = replace(method, estimator=Unroll(objective=lambda steps, outer_step, weights=weights: weights))
            close(engine(method.phi, batch, (), step).grad, Engine(fixed, "loop", "graph", "eager")(method.phi, batch).grad)


def test_nothing_adapts_is_refused_and_so_is_a_head_that_is_not_there() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"nothing adapts: of the 4 weights none .* take steps=0"):
        mo.compose(net, mse, rule=SGD(0.1), adapts=lambda name: False)
    with pytest.raises(ValueError, match=r"the network has no submodule `top` for its head; its own are: 0, 1, 2"):
        mo.anil(net, cross_entropy, head="top")
    with pytest.raises(ValueError, match="no submodule `head` and no linear layer"):
        mo.anil(nn.Conv2d(1, 1, 1), cross_entropy)
    assert mo.anil(net, cross_entropy).adapting == ("2.weight", "2.bias")


def gradient(method: MetaOptimizer, batch: Task) -> MetaParams:
    return Engine(method, "vmap", "graph", "eager")(method.phi, batch).grad


def test_anil_of_a_head_alone_is_maml_and_so_is_the_composition_of_its_choices() -> None:
    net, head, batch = mlp((3, 4, 2), "tanh"), nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), regression()
    close(gradient(mo.anil(head, mse, lr=0.3, steps=2), batch), gradient(mo.maml(head, mse, lr=0.3, steps=2), batch))
    composed = mo.compose(net, mse, rule=SGD(0.3), steps=2)
    close(gradient(composed, batch), gradient(mo.maml(net, mse, lr=0.3, steps=2), batch))
