"""The gradient doctor: planted faults are caught, and the layer is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from metaoptim import rules
from metaoptim.algorithms import maml
from metaoptim.core.losses import cross_entropy
from metaoptim.core.types import Batch, Estimate, MetaOptimizer, MetaParams, Params, Rule, State, Step, Task
from metaoptim.estimators import Unroll
from metaoptim.gradcheck import Report, check, overshoot, self_check
from metaoptim.learners import GradientLearner, Network

FEW = [("loop", "graph", "eager"), ("vmap", "graph", "eager")]


def small(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), layer, nn.Tanh(), nn.Linear(6, 2))


def batch() -> Task:
    g = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Batch:
        return torch.randn(2, rows, 3, generator=g), torch.randint(2, (2, rows), generator=g)

    return Task(draw(4), draw(5))


def examined(layer: nn.Module) -> Report:
    return check(maml(small(layer), cross_entropy, lr=0.5), batch(), modes=FEW)


class Detaches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach().sin()


class Data(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.data + self.weight


class Silent(torch.autograd.Function):
    """exp, whose backward pass computes with a constant: right once, silently wrong twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].detach()


class Once(Silent):
    """The same, whose backward pass can't be differentiated at all."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        nn.Module.__init__(self)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function.apply(x)
        return out


class Dice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + random.random())


FAULTS: dict[str, Callable[[], nn.Module]] = {
    "detaches": Detaches,
    "param.data": Data,
    "no double backward": lambda: Applies(Once),
    "a silent double backward": lambda: Applies(Silent),
    "randomness of its own": Dice,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_its_layer_named(fault: str) -> None:
    layer = FAULTS[fault]()
    report = examined(layer)
    said = "\n".join((*report.faults, *report.notes))
    assert not report.ok
    assert f"`1` ({type(layer).__name__})" in said, str(report)
    assert "`0`" not in said and "`3`" not in said, "the others are healthy"


def test_a_fault_deep_inside_is_named_by_its_own_path() -> None:
    report = examined(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), Detaches())))
    assert "`1.1.1` (Detaches)" in "\n".join(report.faults)


def test_a_gradient_outside_vmap_with_a_stock_batch_norm() -> None:
    net = small(nn.BatchNorm1d(6, track_running_stats=False))
    optimizer = maml(net, cross_entropy, lr=0.5)

    def loss(weights: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(net, weights, (data[0],)), data[1])

    def one(weights: Params, task: Task) -> Tensor:
        g = grad(loss)(weights, task.support)
        return loss({n: w - 0.5 * g[n] for n, w in weights.items()}, task.query)

    def outside(meta: MetaParams, tasks: Task) -> Estimate:
        gradient, loss = grad_and_value(lambda w: vmap(one, in_dims=(None, 0))(w, tasks).mean())(meta.weights)
        return Estimate(loss, MetaParams(gradient, {}))

    report = check(optimizer, batch(), gradient=outside)
    assert not report.ok
    assert "`1` (BatchNorm1d)" in "\n".join(report.faults), str(report)
    assert check(optimizer, batch(), modes=FEW).ok, "the engine takes it inside"


def without_state(rule: Rule, lost: str) -> Rule:
    """A rule that doesn't read, or doesn't hand on, its state."""

    class Forgetful:
        start, init = staticmethod(rule.start), staticmethod(rule.init)

        def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
            zeros = rule.init(psi, weights)
            updates, after = rule.update(psi, grads, zeros if lost == "read" else state, weights, step)
            return updates, after if lost == "read" else zeros

    return Forgetful()


@pytest.mark.parametrize("lost", ["read", "written"])
def test_a_rule_that_ignores_its_state(lost: str) -> None:
    def built(rule: Rule) -> MetaOptimizer:
        network = Network(small(nn.Tanh()), cross_entropy)
        return MetaOptimizer(GradientLearner(network, rule, 2), Unroll(), MetaParams(network.weights(), {}))

    report = check(built(without_state(rules.Momentum(0.1), lost)), batch(), modes=FEW)
    assert not report.ok and "state" in "\n".join(report.faults), str(report)
    assert check(built(rules.Momentum(0.1)), batch(), modes=FEW).ok


def test_training_says_so_once_and_leaves_everything_as_it_was() -> None:
    sick, healthy = maml(small(Detaches()), cross_entropy, lr=0.5), maml(small(nn.Tanh()), cross_entropy, lr=0.5)
    before = torch.get_rng_state()
    said = self_check(sick, sick.phi, batch())
    assert said is not None and said.startswith("the meta-gradient of maml is off from central differences of its own loss by ")
    assert self_check(healthy, healthy.phi, batch()) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_infinite_data_are_blamed_and_no_layer() -> None:
    method, tasks = maml(small(nn.Tanh()), cross_entropy, lr=0.5), batch()
    tasks.query[0][1, 0, 0] = torch.inf  # tanh makes a finite loss of it, and no finite slope
    told = "the data of task 1 hold infinity, in the inputs of its query set"
    assert self_check(method, method.phi, tasks) == f"{told}, with which no meta-gradient can be right."
    assert check(method, tasks, modes=FEW[:1]).faults == (f"{told}: no layer can be judged by them.",)
    tasks = batch()
    tasks.support[0][0, 0, 0] = torch.inf
    assert overshoot(method, method.phi, tasks) is None
