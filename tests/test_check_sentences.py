"""What a check says of what it is given, beside its numbers."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim as mo
from metaoptim.gradcheck.case import prepare
from metaoptim.gradcheck.claims import judge
from metaoptim.gradcheck.compare import Estimated

FEW: Any = [("loop", "graph", "eager"), ("vmap", "graph", "eager")]


def small(net: nn.Module | None = None, loss: Any = mo.losses.mse) -> mo.MetaOptimizer:
    torch.manual_seed(0)
    return mo.maml(net or nn.Linear(3, 2), loss, steps=1, lr=0.1)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x).round()


def flat(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(-1).to(output.dtype).mean()


@pytest.mark.parametrize("method", [small(loss=flat), small(Rounded(3, 2))], ids=["argmax", "round"])
def test_a_gradient_that_is_zero_everywhere_is_not_right(method: mo.MetaOptimizer) -> None:
    report = mo.check(method, input=(3,), modes=FEW)
    assert not report.ok and report.faults[0].startswith("no weight influences the loss: its meta-gradient is zero")


@pytest.mark.parametrize(
    "modes",
    ["eager", ("vmap", "graph", "eager"), [("vmapp", "graph", "eager")], [("vmap", "graph")], [], None, [("loop", 1, "eager")]],
)
def test_modes_of_another_kind_are_refused(modes: Any) -> None:
    with pytest.raises(ValueError, match=r"modes=.*it must be 'quick', 'all', or a list|batching"):
        mo.check(small(), modes=modes)


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


class Detached(Old):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class Through(nn.Linear):
    function: Any = Old

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(nn.Linear.forward(self, x))


def test_an_old_style_function_is_told_for_what_plain_autograd_makes_of_it() -> None:
    net = Through(3, 2)
    assert "torch.func, as vmap and graphs use it, can't take its first derivative" in str(mo.check(small(net), modes=FEW))
    net.function = Detached
    report = mo.check(small(net), modes=FEW)
    assert not report.ok and "its second derivative" in report.faults[0] and "a detach" in report.faults[0]


X = torch.randn(2, 6, 3)
CROSS, BINARY = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
WEIGHTED = nn.CrossEntropyLoss(torch.ones(3))
DOUBLE = nn.Linear(3, 2).double()


@pytest.mark.parametrize(
    ("method", "x", "y", "told"),
    [
        (small(nn.Linear(3, 1), BINARY), X, torch.ones(2, 6, 1).long(), "the loss (BCEWithLogitsLoss) .*targets: y.float()"),
        (
            small(loss=nn.CrossEntropyLoss(torch.ones(3))),
            X,
            torch.ones(2, 6).long(),
            "the loss .*expected what the model reads and the loss takes",
        ),
        (small(loss=CROSS), X, torch.ones(2, 6).int(), "the loss .*expected class numbers as targets: y.long()"),
        (small(loss=CROSS), X, torch.full((2, 6), 5), "the loss .*targets below its outputs"),
        (small(), X.double(), torch.ones(2, 6, 2), "Linear.*one type: .float() of the data, or net.double()"),
        (small(DOUBLE), X, torch.ones(2, 6, 2), "one type: .double() of the data, or net.float()"),
        (small(), X.long(), torch.ones(2, 6, 2), "expected floats as inputs: x.float()"),
    ],
    ids=["binary", "weights", "int", "classes", "double", "single", "long"],
)
def test_data_of_another_type_say_what_to_give(method: mo.MetaOptimizer, x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
        mo.MetaModule(method).backward(mo.Task((x, y), (x, y)))


NET: Any = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: mo.MetaModule(NET), r"MetaModule takes a meta-optimizer, such as mo.maml\(net, loss\); found Linear"),
        (lambda: mo.check(NET), "check takes a meta-optimizer"),
        (lambda: mo.Engine(NET), "Engine takes a meta-optimizer"),
        (lambda: mo.load("a", NET), "load takes a meta-optimizer"),
        (lambda: mo.load("a"), "needs the meta-optimizer that the run was trained with"),
        (lambda: mo.Run(small(), small().phi).adapt(X[0]), r"found a Tensor: give \(x, y\)"),
        (lambda: mo.maml(NET, mo.losses.mse, lr=torch.tensor(0.1)), "lr=.* a positive Python number"),  # type: ignore[arg-type]
    ],
)
def test_a_thing_of_another_kind_is_told_with_what_to_give(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_a_class_that_the_support_lacks_is_told() -> None:
    net, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.tensor([[0, 0, 0]])
    batch = mo.Task((X[:1, :3], y), (X[:1, 3:], y + 1))
    with pytest.raises(ValueError, match=r"step 1 .*: class 1 is in the query set of task 0 and not in its support.*larger"):
        mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), [batch], 1, 0.1, method="protonet")


class Drawing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) * (1 + random.random())


def test_a_model_that_draws_is_told_once_in_a_few_lines() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = mo.check(small(Drawing(3, 2)), modes=[FEW[0], ("loop", "graph", "trace")])
    assert "draws random numbers of its own" in report.faults[0]
    assert repr(report) == str(report) and len(repr(report).splitlines()) < 4


def test_a_hypergradient_prints_as_one_line() -> None:
    def loss(weights: Any, hyper: Any) -> Tensor:
        return (weights["w"] * hyper["h"] - 1).square().mean()

    given = {"w": torch.zeros(300)}, {"h": torch.ones(300)}
    found = mo.hypergradient(loss, loss, *given, rule=mo.rules.SGD(0.1), steps=2)
    assert found.loss.isfinite()
    assert repr(found).startswith("Hypergradient(loss=0.9973, hyper: 300 numbers") and len(repr(found)) < 90


@pytest.mark.parametrize("net", [lambda: nn.Linear(8, 1), lambda: mo.nn.mlp((8, 20, 1), "tanh")], ids=["flat", "indefinite"])
def test_an_implicit_gradient_without_a_minimum_is_not_checked(net: Any) -> None:
    """Fewer rows than numbers leave directions without curvature; they were a singular matrix in every mode."""
    torch.manual_seed(0)
    parts = (torch.randn(3, 5, 8), torch.randn(3, 5, 1)), (torch.randn(3, 5, 8), torch.randn(3, 5, 1))
    method = mo.compose(net(), mo.losses.mse, rule=mo.rules.SGD(0.01), steps=3, estimator=mo.estimators.Implicit())
    report = mo.check(method, mo.Task(*parts))
    assert report.verdict.startswith("not checked: compose, the implicit meta-gradient") and not report.ok
    assert len(report.faults) == 1 and "no minimum near the run's end (its gradient is" in report.faults[0]
    assert "damping beyond that curvature" in report.faults[0]
    assert "not checked" in report.json() and "not checked" in str(report)


class Halved(mo.estimators.Implicit):
    """Wrong whatever the solver is."""

    def solve(self, *args: Any) -> Any:
        return {n: v / 2 for n, v in super().solve(*args).items()}


@pytest.mark.usefixtures("doubles")
def test_an_implicit_estimator_of_ones_own_is_held_to_what_it_computes_itself() -> None:
    torch.manual_seed(0)
    data = torch.randn(2, 9, 2), torch.randn(2, 9, 1)

    def error(estimator: Any) -> float:
        method = mo.compose(mo.nn.mlp((2, 3, 1), "tanh"), mo.losses.mse, rule=mo.rules.SGD(0.1), steps=5, prox=4.0,
                            estimator=estimator)  # fmt: skip
        return judge(prepare(method, method.phi, mo.Task(data, data), 2), ("loop", "graph", "eager")).error

    assert error(mo.estimators.Implicit(iterations=1)) < 1e-8 and error(Halved()) > 0.01


def curved(estimator: Any, lr: float = 0.1, loss: Any = mo.losses.mse, hidden: int = 2, steps: int = 8) -> Any:
    torch.manual_seed(0)
    net, rule = mo.nn.mlp((1, hidden, 1), "tanh"), mo.rules.SGD(lr)
    method = mo.compose(net, loss, rule=rule, steps=steps, prox=2.0, estimator=estimator)
    return mo.check(method, mo.tasks.sinusoid(), modes=[("loop", "graph", "eager"), ("vmap", "graph", "eager")])


@pytest.mark.slow
def test_modes_that_agree_with_a_wrong_one_are_not_called_right() -> None:
    report = curved(Halved())
    assert "2 of 2 execution modes are off" in report.verdict and "an estimator or a learner of your own" in report.faults[-1]


def test_what_keeps_an_implicit_gradient_from_being_checked_is_named() -> None:
    diverges = curved(mo.estimators.Implicit(), 1.0, lambda o, y: (o - y).square().mean() + (o - y).pow(4).mean())
    assert "the inner run diverges" in diverges.faults[0] and "a smaller step size" in diverges.faults[0]

    def half_seen(output: Any, target: Any) -> Any:
        """Its gradient is that of √(1 + d²), its second derivative is not."""
        d = output - target
        return (d * (d / (1 + d.square()).sqrt()).detach()).mean()

    detached = curved(mo.estimators.Implicit(), loss=half_seen, hidden=4, steps=12)
    assert "a part that its second derivative doesn't see" in detached.faults[0]


def test_a_solver_that_is_not_done_is_no_design() -> None:
    report = curved(mo.estimators.Implicit(solver="neumann", scale=5.0))
    assert report.ok and any("more iterations of the solver" in note for note in report.notes)


HELD = torch.eye(2)


def test_floats_that_a_check_can_not_recast_are_told() -> None:
    method = small(loss=lambda output, y: mo.losses.mse(output @ HELD, y))
    batch = mo.Task((X, X[..., :2]), (X, X[..., :2]))
    mo.MetaModule(method).backward(batch)
    for call in (mo.check, mo.compare_estimators):
        with pytest.raises(ValueError, match=r"in float64, and .* holds a float32 tensor.*as in t\.to\(output\.dtype\)"):
            call(method, batch)


@dataclass(frozen=True)
class Summed:
    def start(self, weights: Any, generator: Any) -> Any:
        return {}

    def init(self, psi: Any, weights: Any) -> Any:
        return {}

    def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
        return {n: -0.1 * g.sum() for n, g in grads.items()}, state


def test_updates_of_another_shape_are_refused() -> None:
    method = mo.compose(nn.Linear(3, 2), mo.losses.mse, rule=Summed(), steps=1)
    for call in (lambda: mo.MetaModule(method).backward(mo.Task((X, X[..., :2]), (X, X[..., :2]))), lambda: mo.check(method)):
        with pytest.raises(ValueError, match=r"the rule Summed returns an update of shape \(\) for the weight `weight`"):
            call()


def test_a_bias_that_is_not_seen_is_told_by_its_bound() -> None:
    told = [Estimated("", bias, error, 1.0, 1.0).told for bias, error in ((0.0, 22.06), (0.5, 0.1), (0.381, 0.0))]
    assert told == ["below 4412%", "50.0% ± 10.0%", "38.1%"]
