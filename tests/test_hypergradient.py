"""Hypergradients: closed forms of a quadratic problem, loops that are written out, and what each method claims."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.gradients import exact
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import Clock, Estimator, MetaOptimizer, MetaParams, Params, State, Step, Task
from metaoptim.engine import Engine, offered
from metaoptim.estimators import SAMA, FiniteDifferences, LastSteps, Unroll, WarpObjective
from metaoptim.gradcheck import check
from metaoptim.gradcheck.case import REFERENCE, prepare
from metaoptim.gradcheck.claims import judge
from metaoptim.nn import mlp
from metaoptim.rules import SGD, Adam, Momentum, Schedule, chain

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")

CLOCK = Clock(torch.tensor(0), torch.tensor(7))


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(trees.flatten(found), trees.flatten(expected), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3), f"{a} is not {b}"


# --- A quadratic problem: f = ½ (w − c)ᵀ A (w − c) + ½ e^ρ ‖w‖², g = ½ (w − q)ᵀ Q (w − q) + ½ ‖c‖²; gradient descent of size α.


@dataclass(frozen=True)
class Quadratic:
    """With M = A + e^ρ I and B = I − α M: w_T = Bᵀ w_0 + (I − B^T) M⁻¹ A c."""

    a: Tensor
    q: Tensor
    target: Tensor
    w: Tensor
    c: Tensor
    rho: Tensor
    lr: float = 0.2

    def train_loss(self, weights: Params, hyper: Params) -> Tensor:
        gap = weights["w"] - hyper["c"]
        return 0.5 * gap @ self.a @ gap + 0.5 * hyper["rho"].exp() * weights["w"].square().sum()

    def val_loss(self, weights: Params, hyper: Params) -> Tensor:
        gap = weights["w"] - self.target
        return 0.5 * gap @ self.q @ gap + 0.5 * hyper["c"].square().sum()

    @property
    def m(self) -> Tensor:
        return self.a + self.rho.exp() * torch.eye(len(self.w))

    def run(self, steps: int) -> list[Tensor]:
        """w_0 … w_T in closed form."""
        least = torch.linalg.solve(self.m, self.a @ self.c)
        return [least + self.power(k) @ (self.w - least) for k in range(steps + 1)]

    def power(self, k: int) -> Tensor:
        return torch.linalg.matrix_power(torch.eye(len(self.w)) - self.lr * self.m, k)

    def through(self, steps: int, window: int) -> Params:
        """The gradient in c, ρ and log α through the last steps of the run."""
        at = self.run(steps)
        slope = self.q @ (at[-1] - self.target)
        back = [(k, self.power(steps - 1 - k) @ slope) for k in range(steps - window, steps)]
        total = -self.lr * torch.stack([v @ (self.m @ at[k] - self.a @ self.c) for k, v in back]).sum()
        return {
            "c": self.c + self.lr * torch.stack([self.a @ v for _, v in back]).sum(0),
            "rho": -self.lr * self.rho.exp() * torch.stack([v @ at[k] for k, v in back]).sum(),
            "log_lr": total,
        }

    def implicit(self) -> Params:
        """The gradient in c and ρ where the training loss is least."""
        least = torch.linalg.solve(self.m, self.a @ self.c)
        v = torch.linalg.solve(self.m, self.q @ (least - self.target))
        return {"c": self.c + self.a @ v, "rho": -self.rho.exp() * least @ v}

    def found(self, steps: int, method: str | Estimator = "exact", step_size: bool = False, **options: Any) -> Params:
        rule = chain(SGD(1.0), Schedule(self.lr)) if step_size else SGD(self.lr)
        psi = {"1.log_lr.all": torch.tensor([self.lr]).log()} if step_size else None
        given = {"c": self.c, "rho": self.rho}
        result = mo.hypergradient(
            self.train_loss, self.val_loss, {"w": self.w}, given, rule=rule, steps=steps, method=method, psi=psi, **options
        )
        close(result.weights["w"], self.run(steps)[-1])
        close(result.loss, self.val_loss(result.weights, given))
        return result.hyper | ({"log_lr": result.psi["1.log_lr.all"][0]} if step_size else {})


def quadratic(seed: int, size: int = 4) -> Quadratic:
    torch.manual_seed(seed)
    roots = torch.randn(2, size, size)
    a, q = roots @ roots.mT / size + 0.3 * torch.eye(size)
    return Quadratic(a, q, torch.randn(size), torch.randn(size), torch.randn(size), torch.tensor(-0.7))


@pytest.mark.parametrize("memory", ["graph", "steps", "mixed"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_exact_is_the_closed_form(steps: int, memory: str) -> None:
    for seed in range(3):
        problem = quadratic(seed)
        expected = problem.through(steps, steps)
        close(problem.found(steps, memory=memory, step_size=True), expected)
        assert all(abs(x).max() > 1e-4 for x in expected.values())


@pytest.mark.parametrize("window", [1, 3, 7])
def test_truncated_is_the_closed_form_of_its_window(window: int) -> None:
    problem = quadratic(1)
    close(problem.found(7, "truncated", step_size=True, window=window), problem.through(7, window))
    close(problem.found(7, LastSteps(window), step_size=True), problem.through(7, window))


@pytest.mark.parametrize("steps", [1, 5])
def test_sama_is_the_last_step_and_its_difference_is_exact_on_quadratics(steps: int) -> None:
    problem = quadratic(2)
    for options in ({}, {"radius": 0.01}, {"radius": 1.0}):
        close(problem.found(steps, "sama", step_size=True, **options), problem.through(steps, 1), 1e-9)


def test_at_a_minimum_sama_takes_the_hessian_for_the_inverse_of_the_step_size() -> None:
    """With M = I / α both are one (identity approximation); elsewhere they are not."""
    problem = replace(quadratic(3), rho=torch.tensor(0.5).log())
    exactly = replace(problem, a=(1 / problem.lr - 0.5) * torch.eye(4))
    close(exactly.found(50, "sama"), exactly.implicit(), 1e-9)
    gap = trees.norm(trees.subtract(problem.found(400, "sama"), problem.implicit()))
    assert gap > 0.05 * trees.norm(problem.implicit())


@pytest.mark.parametrize("options", [{"iterations": 4}, {"solver": "neumann", "iterations": 300, "scale": 0.2}])
def test_implicit_is_the_closed_form_at_the_minimum(options: dict[str, Any]) -> None:
    problem = quadratic(4)
    close(problem.found(600, "implicit", **options), problem.implicit(), 1e-9)
    close(problem.found(600, "exact"), problem.implicit(), 1e-9)


def test_finite_differences_are_off_by_the_square_of_the_step() -> None:
    problem = quadratic(5)
    expected = problem.through(4, 4)
    close(problem.found(4, "finite_differences", step_size=True), expected, 1e-8)
    gaps = [abs(problem.found(4, FiniteDifferences(h))["rho"] - expected["rho"]) for h in (4e-2, 2e-2, 1e-2)]
    assert 3.9 < gaps[0] / gaps[1] < 4.1 and 3.9 < gaps[1] / gaps[2] < 4.1


def test_sama_goes_through_the_rule_as_an_uncorrected_adam_has_it() -> None:
    """At g = .2, m = .1, v = .04 the published code has 4.97249925e-4, with ε = 1e-8 in another place: 1e-7 of it."""

    class Uncorrected:
        def start(self, weights: Params, generator: torch.Generator) -> Params:
            return {}

        def init(self, psi: Params, weights: Params) -> State:
            return {"m": torch.tensor([0.1]), "v": torch.tensor([0.04])}

        def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
            m, v = 0.9 * state["m"] + 0.1 * grads["w"], 0.999 * state["v"] + 0.001 * grads["w"] ** 2
            return {"w": -1e-3 * m / (v.sqrt() + 1e-8)}, {"m": m, "v": v}

    found = mo.hypergradient(
        lambda weights, hyper: (hyper["h"] * weights["w"]).sum(),
        lambda weights, hyper: weights["w"].sum(),
        {"w": torch.tensor([3.0])}, {"h": torch.tensor(0.2)}, rule=Uncorrected(), steps=1, method="sama",
    )  # fmt: skip
    root = 0.04**0.5 + 1e-8
    exactly = 1e-3 * (0.1 / root - 0.11 * 0.001 * 0.2 / 0.04**0.5 / root**2)
    assert found.hyper["h"].item() == pytest.approx(-exactly, rel=1e-9) == pytest.approx(-4.97249925e-4, rel=2e-7)


# --- A network, minibatches, and loops that are written out ---------------------------------------------------------------


def rows(count: int = 12, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g), torch.arange(count) % 2, torch.arange(count)


def weighted(net: Any, hyper: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    each = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    return (hyper["weights"][batch[2]].sigmoid() * each).mean() + hyper["decay"].exp() * net.weights["0.weight"].square().sum()


def plain(net: Any, hyper: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def hypers(count: int = 12) -> Params:
    return {"weights": torch.linspace(-1, 1, count), "decay": torch.tensor(-2.0)}


@dataclass
class Callee:
    """What a loss gets, by torch's own means."""

    net: nn.Module
    weights: Params

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = functional_call(self.net, self.weights, (x,))
        return found


def written_out(net: nn.Module, hyper: Params, steps: int, size: int, lr: float = 0.3, decay: float = 0.6) -> list[Any]:
    """Momentum on minibatches in the order of the rows: the loss, the gradient and the weights, by plain autograd."""
    leaves = {n: x.clone().requires_grad_() for n, x in hyper.items()}
    w: Params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    data = rows()
    for k in range(steps):
        chosen = [(k * size + i) % 12 for i in range(size)]
        loss = weighted(Callee(net, w), leaves, tuple(x[chosen] for x in data))  # type: ignore[arg-type]
        slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        m = {n: decay * m[n] + g for n, g in zip(w, slopes, strict=True)}
        w = {n: p - lr * m[n] for n, p in w.items()}
    loss = plain(Callee(net, w), leaves, rows(8, 4))
    return [loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), w]


def on_a_network(net: nn.Module, hyper: Any, steps: int = 5, **options: Any) -> mo.training.Hypergradient:
    given = {"rule": Momentum(0.3, 0.6), "batch_size": 5, "steps": steps, **options}
    return mo.hypergradient(weighted, plain, net, hyper, rows(), rows(8, 4), **given)


@pytest.mark.parametrize("memory", ["graph", "steps", "mixed"])
def test_minibatches_momentum_and_a_module_are_as_written_out(memory: str) -> None:
    net = mlp((3, 4, 2), "tanh")
    found, expected = on_a_network(net, hypers(), memory=memory), written_out(net, hypers(), 5, 5)
    close([found.loss, found.hyper, found.weights], expected)


def test_nothing_that_is_given_changes() -> None:
    net = mlp((3, 4, 2), "tanh")
    hyper = {n: nn.Parameter(x) for n, x in hypers().items()}
    before = copy.deepcopy(net), {n: x.detach().clone() for n, x in hyper.items()}, torch.get_rng_state()
    found = on_a_network(net, hyper)
    torch.set_rng_state(before[2])
    again = on_a_network(net, nn.ParameterDict(hyper))
    assert torch.equal(found.loss, again.loss) and all(torch.equal(g, again.hyper[n]) for n, g in found.hyper.items())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(net.parameters(), before[0].parameters(), strict=True))
    assert all(torch.equal(x, before[1][n]) and x.grad is None for n, x in hyper.items())
    assert not any(x.requires_grad for x in trees.flatten(found))


def test_a_dictionary_and_a_module_of_the_same_weights_give_the_same() -> None:
    net = mlp((3, 4, 2), "tanh")
    expected = on_a_network(net, hypers())

    def by_name(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda weights, hyper, batch: loss(Callee(net, weights), hyper, batch)

    weights = {n: p.detach() for n, p in net.named_parameters()}
    found = mo.hypergradient(
        by_name(weighted), by_name(plain), weights, hypers(), rows(), rows(8, 4), rule=Momentum(0.3, 0.6), batch_size=5, steps=5
    )
    close([found.loss, found.hyper, found.weights], [expected.loss, expected.hyper, expected.weights], 1e-12)


def test_frozen_parameters_stay_and_a_network_may_be_the_hyper_parameters() -> None:
    net, weigher = mlp((3, 4, 2), "tanh"), mlp((1, 3, 1), "tanh")
    net[0].weight.requires_grad_(False)
    weigher[2].bias.requires_grad_(False)

    def by_loss(net: Any, weigher: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return (weigher(each[:, None])[:, 0].sigmoid() * each).mean()

    options: dict[str, Any] = {"rule": SGD(0.5), "steps": 3}
    found = mo.hypergradient(by_loss, plain, net, weigher, rows(), rows(8, 4), **options)
    assert found.hyper.keys() == {"0.weight", "0.bias", "2.weight"} and all(g.norm() > 1e-6 for g in found.hyper.values())
    assert torch.equal(found.weights["0.weight"], net[0].weight)
    assert not torch.equal(found.weights["0.bias"], net[0].bias)
    close(
        found.hyper,
        mo.hypergradient(by_loss, plain, net, weigher, rows(), rows(8, 4), method="finite_differences", **options).hyper,
        1e-7,
    )


def test_a_run_can_be_gone_on_with() -> None:
    """Weights, momentum, the place in the data and in the schedule: two halves are the whole."""
    net = mlp((3, 4, 2), "tanh")
    rule = chain(Momentum(1.0, 0.6), Schedule(0.3, steps=6))
    psi = {"1.log_lr.all": torch.linspace(-2, -1, 6)}
    whole = on_a_network(net, hypers(), 6, rule=rule, psi=psi)
    first = on_a_network(net, hypers(), 2, rule=rule, psi=psi)
    second = on_a_network(net, hypers(), 4, rule=rule, psi=psi, start=first.end)
    close([second.loss, second.weights, second.end[1]], [whole.loss, whole.weights, whole.end[1]], 1e-14)
    assert second.end[0] == whole.end[0] == 6
    assert (second.psi["1.log_lr.all"] != 0).tolist() == [False, False, True, True, True, True]
    close(second.psi["1.log_lr.all"][2:], whole.psi["1.log_lr.all"][2:])
    truncated = on_a_network(net, hypers(), 6, rule=rule, psi=psi, method="truncated", window=4)
    close([second.hyper, second.psi], [truncated.hyper, truncated.psi])


def test_dropout_is_drawn_by_the_call_and_alike_when_a_step_is_run_again() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    found = []
    for memory in ("graph", "steps"):
        torch.manual_seed(5)
        found.append(on_a_network(net, hypers(), memory=memory))
    close(found[1].hyper, found[0].hyper)
    assert not torch.equal(on_a_network(net, hypers()).loss, found[0].loss)


# --- What estimators claim, in every way of the engine --------------------------------------------------------------------


def problem(estimator: Estimator, rule: Any = None, steps: int = 4) -> tuple[MetaOptimizer, Task]:
    """Hyper-parameters of a network's training, and two tasks."""
    torch.manual_seed(1)
    net = mlp((3, 4, 2), "tanh")
    method = mo.bilevel(weighted, plain, net, hypers(), rule=rule or SGD(0.3), steps=steps, estimator=estimator, batch_size=7)
    return method, Task(trees.stack([rows(12, 3), rows(12, 5)]), trees.stack([rows(8, 4), rows(8, 6)]))


def shared(estimator: Estimator) -> tuple[MetaOptimizer, Task]:
    """A body that is learnt under a head that adapts, as ANIL's, with learnt step sizes."""
    torch.manual_seed(1)
    rule = chain(SGD(1.0), Schedule(0.3, 3, group=lambda name: name.split(".")[-1]))
    method = mo.compose(
        mlp((3, 4, 2), "tanh"), mo.losses.cross_entropy, rule=rule, steps=3, adapts="head", learns="body", estimator=estimator
    )
    return method, Task(
        *trees.map_tensors(lambda x: x, [trees.stack([rows(6, s)[:2] for s in pair]) for pair in ((3, 5), (4, 6))])
    )


ESTIMATORS: dict[str, Estimator] = {
    "last steps": LastSteps(2), "all steps": LastSteps(3), "SAMA": SAMA(), "differences": FiniteDifferences(),
    "warp": WarpObjective(),
}  # fmt: skip


@pytest.mark.parametrize("make", [problem, shared])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_what_it_claims_to_be(name: str, make: Any) -> None:
    method, batch = make(ESTIMATORS[name])
    verdict = judge(prepare(method, method.phi, batch, 2), REFERENCE)
    assert verdict.error <= verdict.limit


@pytest.mark.parametrize("make", [problem, shared])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_way_gives_the_same_numbers(name: str, make: Any) -> None:
    method, batch = make(ESTIMATORS[name])
    expected = Engine(method, "loop", "graph", "eager")(method.phi, batch)
    assert all(g.norm() > 1e-9 for g in trees.flatten(expected.grad))
    traced = [] if name == "differences" else [("vmap", "graph", "trace")]
    for way in [way for way in offered(method) if way[2] == "eager"] + traced:
        found = Engine(method, *way)(method.phi, batch)
        close([found.loss, found.grad], [expected.loss, expected.grad], {"differences": 1e-7, "SAMA": 1e-8}.get(name, 1e-9))


@pytest.mark.parametrize("rule", [Momentum(0.2, 0.5), Adam(0.05, b1=0.5, b2=0.8)])
@pytest.mark.parametrize("name", ["last steps", "SAMA", "differences", "warp"])
@pytest.mark.slow
def test_the_doctor_finds_them_right_with_rules_that_remember_and_hold(name: str, rule: Any) -> None:
    report = check(*problem(ESTIMATORS[name], rule, 3), modes=[REFERENCE])
    assert report.ok, report
    assert ("away from the exact meta-gradient, by design" in str(report)) == (name != "differences")


@dataclass(frozen=True)
class Longer(LastSteps):
    """Says that it sees a step more than it does."""

    def __call__(self, *args: Any) -> Any:
        return LastSteps(self.window - 1)(*args)


@dataclass(frozen=True)
class Still(WarpObjective):
    """Says that it sees no step at all."""

    stepwise = False


@dataclass(frozen=True)
class Nearby(SAMA):
    """Takes its difference across a step, and not about a point."""

    window = 2


@pytest.mark.parametrize("estimator", [Longer(2), Still(), Nearby()])
def test_the_doctor_catches_what_claims_too_much(estimator: Estimator) -> None:
    assert not check(*problem(estimator, steps=3), modes=[REFERENCE]).ok


def test_the_whole_run_is_the_unroll() -> None:
    method, batch = problem(Unroll())
    expected = Engine(method, "loop", "graph", "eager")(method.phi, batch).grad
    whole = replace(method, estimator=LastSteps(4))
    close(Engine(whole, "loop", "graph", "eager")(method.phi, batch).grad, expected, 1e-12)


def test_the_warp_objective_is_the_sum_of_single_steps_from_held_points() -> None:
    """In weights that adapt it is the first-order unroll of the mean; in others, the exact unroll of each step by itself."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def adapts(name: str) -> bool:
        return not name.startswith("2.")

    method = mo.compose(
        net, mo.losses.cross_entropy, rule=Momentum(0.4, 0.5), steps=3, adapts=adapts, estimator=WarpObjective()
    )
    task = Task(rows(6, 3)[:2], rows(6, 4)[:2])
    found = method.estimator(method.learner, method.phi, task, (), CLOCK)
    first_order = Unroll(first_order=True, objective=trajectory_mean)(method.learner, method.phi, task, (), CLOCK)
    close(found.loss, first_order.loss, 1e-12)
    total: Params = {}
    for k, state in list(inner_loop(method.learner, method.phi, task.support, exact))[:3]:
        held: State = trees.map_tensors(Tensor.detach, state)

        def ahead(phi: MetaParams, k: Tensor = k, held: State = held) -> Tensor:
            *_, (_, after) = inner_loop(method.learner, phi, task.support, exact, 1, (k, held))
            return method.learner.loss(phi, after, task.support, task.query, k + 1)[0] / 3

        slopes = torch.func.grad(ahead)(method.phi).weights
        total = trees.add(slopes, total) if total else slopes
    for name, g in found.grad.weights.items():
        close(g, first_order.grad.weights[name] if adapts(name) else total[name])
    assert (total["2.weight"] - first_order.grad.weights["2.weight"]).norm() > 1e-3 * total["2.weight"].norm()


# --- Sentences ------------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> Any:
    given = {
        "train_loss": weighted, "val_loss": plain, "weights": mlp((3, 4, 2), "tanh"), "hyper": hypers(), "data": rows(),
        "val_data": rows(8, 4), "rule": SGD(0.1), "steps": 3, **changes,
    }  # fmt: skip
    return mo.hypergradient(given.pop("train_loss"), given.pop("val_loss"), given.pop("weights"), given.pop("hyper"), **given)


OUTSIDE = nn.Linear(3, 4, dtype=torch.float64)


def itemised(net: Any, hyper: Params, batch: Any) -> Tensor:
    return weighted(net, hyper | {"decay": torch.full_like(hyper["decay"], hyper["decay"].sum().item())}, batch)


def penalised(net: Any, hyper: Params, batch: Any) -> Tensor:
    fixed = {**hyper, "decay": hyper["decay"].detach()}
    return weighted(net, fixed, batch) + hyper["decay"].sum() * OUTSIDE.weight.detach().square().sum()


def end(net: nn.Module | None = None) -> Any:
    return call(weights=net or mlp((3, 4, 2), "tanh")).end


LEARNT = chain(SGD(1.0), Schedule(0.1))
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"val_loss": torch.tensor(1.0)}, "val_loss=.*: it must be a function"),
    "no data for a loss": ({"val_data": None}, r"val_loss is called with \(weights, hyper\): missing a required argument"),
    "data for no loss": ({"val_loss": lambda net, hyper: 0.0}, r"val_loss is called with \(weights, hyper, batch\): too many"),
    "weights in a list": ({"weights": [torch.zeros(3)]}, "weights is a dictionary of tensors by name.*found list"),
    "a number for a tensor": ({"hyper": {"decay": 0.1}}, "hyper is a dictionary of tensors of floats by name; found float"),
    "whole numbers": ({"hyper": {"decay": torch.tensor(1)}}, r"found a tensor of torch\.int64 for 'decay'"),
    "torch's optimizer": ({"rule": torch.optim.SGD([torch.zeros(1)])}, r"rule=SGD: it must be an object such as"),
    "a class of rules": ({"rule": SGD}, r"rule=.*: it must be an object such as mo\.rules\.SGD\(0\.1\)"),
    "half a step": ({"steps": 2.5}, r"steps=2\.5: it must be a whole number"),
    "no rows": ({"batch_size": 0}, "batch_size=0"),
    "an unknown method": ({"method": "exakt"}, "method='exakt' is unknown: choose one of exact, truncated, sama"),
    "an unknown option": ({"method": "sama", "window": 3}, "method='sama' takes the options radius=None; found window=3"),
    "a missing option": ({"method": "truncated"}, "method='truncated' takes the options window=…; found none"),
    "options of an estimator": ({"method": SAMA(), "radius": 1.0}, "radius: these belong to the estimator itself"),
    "a class of estimators": ({"method": SAMA}, "method=.* is none; give one of exact, truncated"),
    "a window too long": ({"method": "truncated", "window": 4}, "window=4: a run has 3 inner steps"),
    "no step": ({"method": "sama", "steps": 0}, "SAMA differentiates through the last inner step, and there is none"),
    "a radius below 0": ({"method": "sama", "radius": -1.0}, r"radius=-1\.0: it must be a positive number"),
    "another memory": ({"method": "sama", "memory": "steps"}, "memory='steps' is not offered here: choose graph"),
    "a carried run": ({"method": mo.estimators.Truncated(1)}, "Truncated carries runs on from call to call: give mo.bilevel"),
    "implicit step sizes": ({"rule": LEARNT, "method": "implicit"}, "an implicit gradient can't train them"),
    "ψ of another shape": ({"rule": LEARNT, "psi": {"1.log_lr.all": torch.zeros(2)}}, r"all \(2,\), and Chain wants .*\(1,\)"),
    "nothing to learn": ({"hyper": {}}, "nothing to differentiate by: hyper is empty"),
    "names that clash": ({"weights": {"hyper.w": torch.zeros(3)}}, r"the weight `hyper\.w` has the name of a hyper-parameter"),
    "torch's batch norm": ({"weights": nn.Sequential(nn.BatchNorm1d(3))}, r"which swaps such layers .* keeps the weights\.$"),
    "all frozen": ({"weights": mlp((3, 4, 2)).requires_grad_(False)}, "no weight adapts"),
    "no scalar": ({"train_loss": lambda net, hyper, batch: net(batch[0])}, r"train_loss returned a tensor of shape \(12, 2\)"),
    "no tensor": ({"val_loss": lambda net, hyper, batch: 1.0}, "val_loss returned float; it must return a scalar tensor"),
    "data of two lengths": ({"data": (rows()[0], rows(5)[1])}, r"data must be tensors with a common .*found \(12, 3\), \(5,\)"),
    "a loader for data": ({"val_data": iter([])}, "val_data must be tensors with a common leading axis.*found list_iterator"),
    "other inputs": ({"data": (rows()[0][:, :2], *rows()[1:])}, r"can't take these data .*found tensors \(12, 2\)"),
    "data of another kind": ({"data": (rows()[0].long(), *rows()[1:])}, r"in the order of data and val_data; expected floats"),
    "a module from outside": ({"train_loss": lambda n, h, batch: OUTSIDE(batch[0]).square().mean()}, "train_loss does not"),
    "no weights in val_loss": ({"val_loss": lambda net, hyper, batch: hyper["decay"].sum()}, "val_loss does not depend on the"),
    "an unread number": ({"hyper": {**hypers(), "other": torch.zeros(2)}}, "the hyper-parameter `other` has no influence"),
    "a number as a float": ({"train_loss": itemised}, "the hyper-parameter `decay` has no influence: .* without .item()"),
    "a float for sama": ({"train_loss": itemised, "method": "sama"}, "the hyper-parameter `decay` has no influence"),
    "a penalty of a module outside": ({"train_loss": penalised}, "the hyper-parameter `decay` has no influence"),
    "a result for its end": ({"start": call()}, r"start is Hypergradient: it must be the `end` .* as in start=found\.end"),
    "weights for an end": ({"start": call().weights}, "start is dict: it must be the `end` of an earlier result"),
    "the end of another network": ({"start": end(mlp((3, 5, 2), "tanh"))}, r"`0\.weight` is \(5, 3\) in it and \(4, 3\) here"),
    "the end of another rule": ({"start": end(), "rule": Momentum(0.1)}, r"the rule for `0\.weight` is missing in it and"),
    "the end of a deeper network": ({"start": end(mlp((3, 4, 2, 2), "tanh"))}, r"`4\.weight` is \(2, 2\) in it and missing"),
    "years of work": ({"method": "finite_differences", "steps": 2**40}, "steps=1099511627776: a training would go through"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_sentence(name: str) -> None:
    changes, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_a_start_is_beyond_what_sees_the_end_alone() -> None:
    for estimator in (SAMA(), LastSteps(2)):
        with pytest.raises(ValueError, match=r"sees the end of a run alone, so that it can't train where the run starts"):
            mo.compose(mlp((3, 4, 2)), mo.losses.mse, rule=SGD(0.1), steps=3, estimator=estimator)
    mo.compose(mlp((3, 4, 2)), mo.losses.mse, rule=SGD(0.1), steps=3, estimator=LastSteps(3))


def test_what_would_be_wrong_silently_is_said() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    def once(net: Any, hyper: Params, batch: Any) -> Tensor:
        return weighted(net, hyper, batch) + Once.apply(net.weights["2.weight"]).sum().sin()  # type: ignore[no-untyped-call]

    call(train_loss=once, method="sama")
    for _ in range(2):
        with pytest.raises(ValueError, match="once_differentiable"):
            call(train_loss=once)
    nothing = torch.zeros(())
    warned, raised = "no weight influences the loss:", "train_loss does not depend"
    with pytest.warns(UserWarning, match=warned), pytest.raises(ValueError, match=raised):
        call(train_loss=lambda net, hyper, batch: nothing, val_loss=lambda net, hyper, batch: nothing)


def told(**changes: Any) -> str:
    with pytest.warns(UserWarning) as caught:
        call(**changes)
    return " ".join(str(w.message) for w in caught)


def test_a_run_that_went_nowhere_is_said_with_its_numbers() -> None:
    said = told(rule=SGD(1e30), steps=20)
    assert re.fullmatch(r"val_loss was [\d.]+ before the first step and is (nan|inf) after 20: .*", said)
    said = told(rule=SGD(1e4), steps=20)
    assert re.fullmatch(
        r"val_loss was [\d.]+ before the first step and is [\d.]+e\+\d+ after 20: the training diverged; .*", said
    )
    (x, *others), (z, *targets) = rows(), rows(8, 4)
    assert told(data=(x * math.nan, *others)) == "data has NaN, in `[0]`, with which no hypergradient can be right."
    assert told(val_data=(z * math.inf, *targets)).startswith("val_data has infinity, in `[0]`, with which")
    rough = told(val_loss=lambda net, hyper, batch: plain(net, hyper, batch) + (0 * hyper["decay"].sum()).abs().sqrt())
    assert "its gradient in `decay` is not finite" in rough


def test_a_gradient_of_zero_is_said_where_a_hyper_parameter_is_read_in_vain() -> None:
    unread = {**hypers(), "other": torch.zeros(2)}
    assert "in the hyper-parameter `other` is 0 throughout" in told(hyper=unread, method="finite_differences")
    call(train_loss=itemised, method="finite_differences")


def test_an_implicit_gradient_away_from_a_minimum_is_said_with_the_slopes() -> None:
    found = re.search(r"the length ([\d.e-]+) after 3 steps, and had ([\d.e-]+) before", told(method="implicit", damping=1.0))
    assert found and float(found[1]) > 0.1 * float(found[2])
    quadratic(4).found(600, "implicit")
