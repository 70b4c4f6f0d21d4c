"""Meta-gradients of every rule, learner and objective against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from metaoptim import nn, rules
from metaoptim.algorithms.matching_net import Attention
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.algorithms.metaoptnet import Convex
from metaoptim.algorithms.protonet import Prototypes
from metaoptim.algorithms.r2d2 import Ridge
from metaoptim.core import objectives
from metaoptim.core.gradients import exact, held
from metaoptim.core.inner_loop import inner_loop, one_step
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.types import (
    Batch,
    Clock,
    Gradient,
    Learner,
    Loss,
    MetaParams,
    Normalisation,
    Params,
    Rule,
    State,
    Step,
    Task,
)
from metaoptim.estimators import Unroll
from metaoptim.learners import ClosedForm, GradientLearner, Network

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")


NOW = torch.tensor(0)
CLOCK = Clock(NOW, torch.tensor(0))


def outer_loss(learner: Learner, estimator: Unroll, meta: MetaParams, task: Task, gradient: Gradient) -> Tensor:
    """Σ_k v_k loss(s_k), written out; the reference that Unroll is held to."""
    batch = task.query if estimator.judged_on == "query" else task.support
    state, total = learner.init(meta, task.support), torch.zeros(())
    for k, weight in enumerate(estimator.objective(learner.steps, CLOCK.outer_step)):
        if k:
            state = one_step(learner, meta, state, task.support, torch.tensor(k - 1), gradient)
        total = total + weight * learner.loss(meta, state, task.support, batch, torch.tensor(k))[0]
    return total


def check_gradient(
    learner: Learner, estimator: Unroll, meta: MetaParams, task: Task, smooth: Learner | None = None, h: float = 1e-5
) -> None:
    """The estimate against central differences, along two random directions per leaf.

    A first-order estimate is the derivative of the run whose inner gradients are replayed as numbers; `smooth` stands in
    for a learner with a part that passes no meta-gradient.
    """
    estimate = estimator(learner, meta, task, (), CLOCK)
    tape: list[tuple[Params, Tensor]] = []

    def record(f: Loss, x: Params) -> tuple[Params, Tensor]:
        tape.append(exact(f, x))
        return tape[-1]

    torch.testing.assert_close(estimate.loss, outer_loss(learner, estimator, meta, task, record), rtol=1e-12, atol=0.0)

    def f(meta: MetaParams) -> Tensor:
        numbers = iter(tape)

        def replay(f: Loss, x: Params) -> tuple[Params, Tensor]:
            return next(numbers)

        return outer_loss(smooth or learner, estimator, meta, task, replay if estimator.first_order else exact)

    for part, leaves in meta._asdict().items():
        assert leaves.keys() == getattr(estimate.grad, part).keys()
        for name, x in leaves.items():
            gradient = getattr(estimate.grad, part)[name]
            for _ in range(2):
                v = torch.randn_like(x)
                ahead, behind = (f(meta._replace(**{part: leaves | {name: x + e * v}})) for e in (h, -h))
                slope, found = (ahead - behind) / (2 * h), (gradient * v).sum()
                assert abs(found - slope) <= 1e-6 * gradient.norm() + 1e-9, f"{part}.{name}: {found} is not {slope}"


def regression(rows: int = 6) -> Task:
    return Task((torch.randn(rows, 3), torch.randn(rows, 2)), (torch.randn(5, 3), torch.randn(5, 2)))


def network(policy: Normalisation = "transductive") -> Network:
    return Network(nn.mlp((3, 4, 2), "tanh"), mse, policy)


def meta_of(net: Network, rule: Rule) -> MetaParams:
    return MetaParams(net.weights(), rule.start(net.weights(), torch.Generator()))


def linear_rule() -> Rule:
    return rules.chain(rules.Clip(norm=0.5), rules.Momentum(0.2, decay=0.8))


class Scales(StepSizes):
    """Step sizes that don't say that they take a step, so that they can scale another rule's."""

    takes_step: ClassVar[Any] = None


def chained_step_sizes() -> Rule:
    return rules.chain(rules.Momentum(1.0, 0.5), rules.Clip(value=0.3), Scales(0.05, 0.3))


RULES: dict[str, Callable[[], Rule]] = {
    "sgd": lambda: rules.SGD(0.3),
    "momentum": lambda: rules.Momentum(0.2, decay=0.7),
    "clip by norm": lambda: rules.chain(rules.Clip(norm=0.4), rules.SGD(0.3)),
    "clip by norm, never reached": lambda: rules.chain(rules.Clip(norm=40.0), rules.SGD(0.3)),
    "clip by value": lambda: rules.chain(rules.Clip(value=0.2), rules.SGD(0.3)),
    "chain": linear_rule,
    "step sizes": lambda: StepSizes(0.05, 0.3),
    "chain with step sizes": chained_step_sizes,
    "average": lambda: rules.chain(rules.SGD(0.3), rules.Average(0.15)),
    "schedule": lambda: rules.chain(rules.Momentum(1.0, 0.5), rules.Schedule(0.3, 3)),
    "schedule by layer": lambda: rules.chain(rules.SGD(1.0), rules.Schedule(0.3, 1, group=lambda n: n.split(".")[0])),
}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str, first_order: bool, steps: int) -> None:
    net, built = network(), RULES[rule]()
    check_gradient(GradientLearner(net, built, steps), Unroll(first_order), meta_of(net, built), regression())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_adam_against_the_run_whose_denominators_are_held(first_order: bool, steps: int) -> None:
    net, task, lr, b1, b2 = network(), regression(), 0.05, 0.6, 0.9
    roots: list[Params] = []
    v = {n: torch.zeros_like(w) for n, w in net.weights().items()}
    w = {n: x.requires_grad_() for n, x in net.weights().items()}
    m = dict(v)
    for t in range(1, steps + 1):  # Adam, written out
        loss = net(w, task.support, None, torch.tensor(0))[0]
        g = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        m = {n: b1 * m[n] + (1 - b1) * x for n, x in g.items()}
        v = {n: b2 * v[n] + (1 - b2) * x**2 for n, x in g.items()}
        roots.append({n: (x / (1 - b2**t)).sqrt() + 1e-8 for n, x in v.items()})
        w = {n: (x - lr * m[n] / (1 - b1**t) / roots[-1][n]).detach().requires_grad_() for n, x in w.items()}

    class HeldAdam:
        def start(self, weights: Params, generator: torch.Generator) -> Params:
            return {}

        def init(self, psi: Params, weights: Params) -> State:
            return {n: torch.zeros_like(x) for n, x in weights.items()}

        def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
            m, k = {n: b1 * state[n] + (1 - b1) * g for n, g in grads.items()}, int(step.k)
            return {n: -lr * x / (1 - b1 ** (k + 1)) / roots[k][n] for n, x in m.items()}, m

    held = HeldAdam()
    learner = GradientLearner(net, rules.Adam(lr, b1, b2), steps)
    check_gradient(learner, Unroll(first_order), meta_of(net, held), task, smooth=GradientLearner(net, held, steps), h=2e-6)


def prototypes_as_head(net: Network) -> Callable[[Params, Batch], Params]:
    """A start that is a function of θ and the support (ProtoMAML): 2 c_n and −‖c_n‖² for class means c_n of features."""

    def start(weights: Params, support: Batch) -> Params:
        features = torch.tanh(support[0] @ weights["0.weight"].T + weights["0.bias"])
        member = torch.nn.functional.one_hot(support[1], 2).to(features.dtype)
        c = member.T @ features / member.sum(0)[:, None]
        return {"2.weight": 2 * c, "2.bias": -c.square().sum(1)}

    return start


def learner_of(kind: str, steps: int) -> tuple[GradientLearner, Task]:
    """A gradient learner with one of its options, and a task for it."""
    net, task, rule = network(), regression(), rules.Momentum(0.2, 0.5)
    if kind == "head only":
        return GradientLearner(net, rule, steps, adapts=lambda n: n.startswith("2.")), task
    if kind == "body only":
        return GradientLearner(net, rule, steps, adapts=lambda n: n.startswith("0.")), task
    if kind == "prox":
        return GradientLearner(net, rule, steps, prox=0.7), task
    if kind == "minibatches":  # 4 of 6 rows: the second and the third wrap around
        return GradientLearner(net, rule, steps, batch_size=4), task
    labelled = Task((task.support[0], torch.arange(6) % 2), (task.query[0], torch.arange(5) % 2))
    net = Network(net.net, cross_entropy)
    return GradientLearner(net, rule, steps, prox=0.3, start=prototypes_as_head(net)), labelled


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["head only", "body only", "prox", "minibatches", "start"])
def test_every_option_of_the_gradient_learner(kind: str, first_order: bool, steps: int) -> None:
    learner, task = learner_of(kind, steps)
    assert isinstance(learner.model, Network)
    check_gradient(learner, Unroll(first_order), MetaParams(learner.model.weights(), {}), task)


OBJECTIVES: dict[str, objectives.Objective] = {
    "last": objectives.last,
    "trajectory mean": objectives.trajectory_mean,
    "multi-step": objectives.multi_step([0.2, 0.0, 0.3, 0.5]),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("judged_on", ["query", "support"])
@pytest.mark.parametrize("first_order", [False, True])
def test_every_objective(objective: str, judged_on: Literal["query", "support"], first_order: bool) -> None:
    net, rule = network(), StepSizes(0.1, 0.4)
    estimator = Unroll(first_order, OBJECTIVES[objective], judged_on)
    check_gradient(GradientLearner(net, rule, 4), estimator, meta_of(net, rule), regression())


def test_weights_of_the_objectives() -> None:
    assert objectives.last(3, NOW) == (0, 0, 0, 1)
    assert objectives.trajectory_mean(4, NOW) == (0, 0.25, 0.25, 0.25, 0.25)
    assert objectives.last(0, NOW) == objectives.trajectory_mean(0, NOW) == (1,)
    assert objectives.multi_step([0.25, 0.75])(2, NOW) == (0, 0.25, 0.75)
    learner = GradientLearner(network(), rules.SGD(0.1), 3)
    for weights, sentence in (
        ([0.5, 0.5], "multi_step has 2 weights for 3 inner steps: give one per step"),
        ([0.0, 0.0, 0.0], "multi_step has nothing but zeros for its 3 weights: give at least one"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Unroll(objective=objectives.multi_step(weights)).check(learner, MetaParams({}, {}))
    with pytest.raises(ValueError, match="the objective gave 2 weights for 3 inner steps: give 4, for s_0 … s_3"):
        Unroll(objective=lambda steps, outer_step: [0.0, 1.0]).check(learner, MetaParams({}, {}))


def test_the_loop_counts_from_its_start() -> None:
    net = network()
    learner, phi = GradientLearner(net, rules.SGD(0.1), 2), MetaParams(net.weights(), {})
    support = regression().support
    assert [int(k) for k, _ in inner_loop(learner, phi, support, held)] == [0, 1, 2]
    start = (torch.tensor(5), learner.init(phi, support))
    assert [int(k) for k, _ in inner_loop(learner, phi, support, held, 3, start)] == [5, 6, 7, 8]


@pytest.mark.parametrize("policy", ["transductive", "inductive", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_convolutions_under_every_normalisation_policy(norm: Literal["batch", "layer"], policy: Normalisation) -> None:
    net = nn.conv4(ways=2, size=6, filters=2, norm=norm)
    for name, buffer in net.named_buffers():  # stored statistics that are neither trivial nor those of any batch
        if name.endswith(("mean", "var")):
            buffer.add_(0.3 * torch.rand_like(buffer))
    task = Task((torch.randn(4, 1, 6, 6), torch.arange(4) % 2), (torch.randn(6, 1, 6, 6), torch.arange(6) % 2))
    judged = Network(net, cross_entropy, policy)
    meta = MetaParams({n: w + 0.2 * torch.randn_like(w) for n, w in judged.weights().items()}, {})
    for first_order in (False, True):
        check_gradient(GradientLearner(judged, rules.SGD(0.1), 2), Unroll(first_order), meta, task, h=1e-6)


# --- Closed forms -------------------------------------------------------------------------------------------------------


def ridge(network: Network, phi: MetaParams, support: Batch) -> Tensor:
    x, y = network.features(phi.weights, support[0], None), support[1]
    solved: Tensor = torch.linalg.solve(x.T @ x + phi.rule["lam"] * torch.eye(x.shape[1]), x.T @ y)
    return solved


def ridge_outputs(network: Network, phi: MetaParams, state: Tensor, support: Batch, x: Tensor) -> Tensor:
    return network.features(phi.weights, x, support) @ state


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_closed_forms_are_differentiated_exactly(first_order: bool, policy: Normalisation) -> None:
    """A ridge head with a learnt λ as ψ, and class means, over features with a batch norm."""
    torch_net = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.BatchNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    task = regression()
    net = Network(torch_net, mse, policy)
    meta = MetaParams({n: w for n, w in net.weights().items() if not net.in_head(n)}, {"lam": torch.tensor(0.5)})
    check_gradient(ClosedForm(net, ridge, ridge_outputs), Unroll(first_order), meta, task, h=1e-6)
    labelled = Task((task.support[0], torch.arange(6) % 2), (task.query[0], torch.arange(5) % 2))
    proto = ClosedForm(Network(torch_net, cross_entropy, policy), Prototypes().fit, Prototypes().predict)
    check_gradient(proto, Unroll(first_order), meta._replace(rule={}), labelled, h=1e-6)


HEADS: dict[str, Attention | Convex | Ridge] = {
    "attention": Attention(5.0),
    "ridge": Ridge(0.5, 3.0),
    "ridge, nothing of it learnt": Ridge(0.5, 3.0, learn_ridge=False, learn_scale=False),
    "support vector machine": Convex("svm", 0.5, 10, 1.0, 1.0),
    "ridge of the dual": Convex("ridge", 0.5, 10, 2.0, 1.0),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("policy", ["transductive", "inductive"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_differentiated_exactly(head: str, policy: Normalisation, first_order: bool) -> None:
    torch_net = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.BatchNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, q = torch.randn(6, 3), torch.randn(5, 3)
    net, task = Network(torch_net, cross_entropy, policy), Task((x, torch.arange(6) % 2), (q, torch.arange(5) % 2))
    base = HEADS[head]
    learnt = {"log_ridge", "log_scale"} if head == "ridge" else {"log_scale"} if isinstance(base, Convex) else set()
    meta = MetaParams({n: w for n, w in net.weights().items() if not net.in_head(n)}, {n: torch.tensor(0.3) for n in learnt})
    check_gradient(ClosedForm(net, base.fit, base.predict), Unroll(first_order), meta, task, h=1e-6)
